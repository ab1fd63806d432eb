#!/usr/bin/env bash
# The main picture again: prefixes of several lengths and two schedules against whole responses, three seeds each, then
# the stop-token trap. About 20 minutes on 2 cores, without the trap. Runs that are complete are not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
to=out_reproduce
mkdir -p $to

run() {  # name, then flags
    name=$1; shift
    for seed in 1 2 3; do
        grep -qs '"step": 30, "eval": "sampled"' "$to/${name}_seed$seed/log.jsonl" && continue
        python train.py --data chains --seed $seed --steps 30 --lr_schedule constant \
            --batch_size 64 --lr 5e-4 --max_new_tokens 512 --eval_every 5 --eval_problems 200 --eval_kl 50 \
            --save_every 15 --out_dir "$to/${name}_seed$seed" --overwrite "$@"
    done
}

for length in 4 8 16 32 1024; do run prefix$length --prefix_len $length; done
run linear --prefix_len 128 --prefix_start 4 --schedule linear
run adaptive --prefix_len 128 --prefix_start 4 --schedule adaptive

python eval.py runs $to/prefix*_seed? --out $to/prefixes.png | tee $to/prefixes.txt
python eval.py runs $to/{prefix1024,linear,adaptive}_seed? --out $to/schedules.png | tee $to/schedules.txt
before_during_after=data/chains/student,$to/prefix16_seed1/step_000015,$to/prefix16_seed1/step_000030
python eval.py positions --data chains --max_new_tokens 256 --model $before_during_after --out $to/positions.png
python eval.py teacher_prefix --data chains --max_new_tokens 256 --out $to/teacher_prefix.png

[ -d $to/other_stop ] || python data/chains/other_stop.py $to/other_stop --scale 0.4
for class in off on; do  # the stop-token trap; without the class a step takes longer and longer, since nothing ends
    run stop_class_$class --student $to/other_stop --stop_class $class --max_new_tokens 256 --prefix_len 256
done
python eval.py runs $to/stop_class_*_seed? --out $to/stop_class.png | tee $to/stop_class.txt

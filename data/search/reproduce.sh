#!/usr/bin/env bash
# The bargain of prefixes on `search`: prefixes of 64 to 1,024 tokens against whole responses, a growing prefix and --mix,
# three seeds each, then the picture. Two runs at a time, one thread each: two to three hours on 2 cores, most of it
# evaluation. Runs that are complete are not run again. Arguments: a folder; "all" for the other rates and the off-policy
# arms as well (twice as long).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
to=${1:-out_reproduce_search}
mkdir -p $to

run() {  # name, steps, then flags: waits while two runs are under way
    name=$1 steps=$2; shift 2
    for seed in 1 2 3; do
        folder=$to/${name}_seed$seed
        grep -qs "after $steps steps" $folder.txt && continue
        while [ $(jobs -rp | wc -l) -ge 2 ]; do sleep 2; done
        python train.py --data search --seed $seed --steps $steps --out_dir $folder --overwrite "$@" > $folder.txt 2>&1 &
    done
}

run prefix64 20 --prefix_len 64
run prefix256 20 --prefix_len 256
run prefix512 20 --prefix_len 512
run prefix1024 20 --prefix_len 1024
run whole 10 --prefix_len 4096
run linear 20 --prefix_len 4096 --prefix_start 64 --schedule linear
run mix 20 --prefix_len 256 --mix 0.1
if [ "${2:-}" = all ]; then
    for lr in 2.5e-4 1e-3; do
        run prefix256_$lr 20 --prefix_len 256 --lr $lr
        run prefix1024_$lr 20 --prefix_len 1024 --lr $lr
        run whole_$lr 10 --prefix_len 4096 --lr $lr
    done
    run seqkd 10 --prefix_len 4096 --rollout teacher --loss cross_entropy
    run off_policy 10 --prefix_len 4096 --rollout teacher
fi
wait
python eval.py runs $to/{prefix64,prefix256,prefix512,prefix1024,whole}_seed? --out $to/bargain.png | tee $to/bargain.txt
python eval.py runs $to/{prefix64,prefix256,prefix1024,whole,linear,mix}_seed? --out $to/schedules.png | tee $to/schedules.txt
for arm in $to/*_seed1; do grep -H "student, \|TFLOP" ${arm%1}?.txt; done > $to/all.txt

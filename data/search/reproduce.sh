#!/usr/bin/env bash
# The bargain of prefixes on `search`: prefixes of 64, 256 and 1,024 tokens against whole responses, a growing prefix and
# --mix, three seeds each, then the picture. Two runs at a time, one thread each. Runs that are complete are not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
to=${1:-out_reproduce_search}
mkdir -p $to

run() {  # name, steps, then flags: waits while two runs are under way
    name=$1 steps=$2; shift 2
    for seed in 1 2 3; do
        folder=$to/${name}_seed$seed
        [ -d $folder/step_$(printf %06d $steps) ] && grep -q "\"step\": $steps, \"eval\"" $folder/log.jsonl && continue
        while [ $(jobs -rp | wc -l) -ge 2 ]; do sleep 2; done
        python train.py --data search --seed $seed --steps $steps --eval_every $((steps / 2)) --out_dir $folder \
            --overwrite "$@" > $folder.txt 2>&1 &
    done
}

run prefix64 40 --prefix_len 64
run prefix256 20 --prefix_len 256
run prefix512 20 --prefix_len 512
run prefix1024 20 --prefix_len 1024
run whole 10 --prefix_len 4096
run linear 20 --prefix_len 4096 --prefix_start 64 --schedule linear
run mix 20 --prefix_len 256 --mix 0.1
wait
python eval.py runs $to/*_seed? --out $to/bargain.png | tee $to/bargain.txt

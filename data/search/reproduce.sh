#!/usr/bin/env bash
# The bargain of prefixes on `search`: prefixes of 64 to 1,024 tokens against whole responses, three seeds each, all but
# 512 also at half and twice the rate; a growing prefix; --mix; then the pictures. With "all" as the second argument two
# off-policy arms, the shortest prefixes and 16 tokens at a random place as well. Two runs at a time, one thread each:
# two hours on 2 cores, three with "all". Runs that are complete are not run again. The first argument is a folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
to=${1:-out_reproduce_search}
mkdir -p $to
files=()  # what the runs print

run() {  # name, steps, then flags: waits while two runs are under way
    name=$1 steps=$2; shift 2
    for seed in 1 2 3; do
        folder=$to/${name}_seed$seed
        files+=("$folder.txt")
        grep -qs "after $steps steps:" $folder.txt && continue
        while [ $(jobs -rp | wc -l) -ge 2 ]; do sleep 2; done
        python train.py --data search --seed $seed --steps $steps --eval_every -1 --out_dir $folder --overwrite "$@" \
            > $folder.txt 2>&1 &
    done
}

run prefix64 20 --prefix_len 64 --eval_every 0 --save_every 10  # these are evaluated before the first step as well
run prefix256 20 --prefix_len 256
run prefix512 20 --prefix_len 512
run prefix1024 20 --prefix_len 1024
run whole 10 --prefix_len 4096
for lr in 2.5e-4 1e-3; do
    run prefix64_$lr 20 --prefix_len 64 --lr $lr
    run prefix256_$lr 20 --prefix_len 256 --lr $lr
    run prefix1024_$lr 20 --prefix_len 1024 --lr $lr
    run whole_$lr 10 --prefix_len 4096 --lr $lr
done
run mix 20 --prefix_len 256 --mix 0.1
run linear 20 --prefix_len 4096 --prefix_start 64 --schedule linear
if [ "${2:-}" = all ]; then
    run prefix16 20 --prefix_len 16
    run prefix32 20 --prefix_len 32
    run random16 20 --prefix_len 16 --window random
    run seqkd 10 --prefix_len 4096 --rollout teacher --loss cross_entropy
    run off_policy 10 --prefix_len 4096 --rollout teacher
fi
wait
failed=$(grep -L "^after [0-9]* steps:" "${files[@]}" || true)
[ -z "$failed" ] || { echo "not complete (run this again): $failed"; exit 1; }
arms=$(ls -d $to/{prefix64,prefix256,prefix1024,whole,off_policy,seqkd}_seed? 2> /dev/null || true)
python eval.py runs $arms --out $to/bargain.png | tee $to/bargain.txt
arms=$(ls -d $to/{prefix64,prefix256,prefix1024,whole,linear,mix}_seed?)
python eval.py runs $arms --out $to/schedules.png | tee $to/schedules.txt
before_during_after=data/search/student,$to/prefix64_seed1/step_000010,$to/prefix64_seed1/step_000020
python eval.py positions --num_problems 50 --model $before_during_after,$to/whole_seed1/step_000010 \
    --out $to/positions.png
python eval.py teacher_prefix --data search --lens 0,16,64,256,1024 --num_problems 100 --out $to/teacher_prefix.png
for arm in $to/*_seed?.txt; do grep -H "accuracy:\|KL to\|TFLOP" $arm; done > $to/all.txt

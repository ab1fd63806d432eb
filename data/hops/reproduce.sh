#!/usr/bin/env bash
# `hops`: every arm of readme.md, three seeds each, then the pictures. Two runs at a time, one thread each. What is
# complete is not run again. The argument is a folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
to=${1:-out_reproduce_hops}
mkdir -p $to
[ -f data/hops/sft_teacher.jsonl ] || python data/hops/prepare.py --sft
other="--student data/hops/student --eval_data data/hops/test.jsonl --data data/hops"  # and the name of a file there

at_most_two() { while [ $(jobs -rp | wc -l) -ge 2 ]; do sleep 1; done; }

steps=20
files=()  # what the runs print

run() {  # name, then flags
    name=$1; shift
    for seed in 1 2 3; do
        folder=$to/${name}_seed$seed
        files+=("$folder.txt")
        grep -qs "after $steps steps:" $folder.txt && continue
        at_most_two
        python train.py --seed $seed --steps $steps --eval_every 5 --max_new_tokens 1024 --out_dir $folder \
            --overwrite "$@" > $folder.txt 2>&1 &
    done
}

run whole --prefix_len 1024
for length in 64 32 16 8 128; do run prefix$length --prefix_len $length; done
run off_policy --prefix_len 1024 --rollout teacher
run seqkd --prefix_len 1024 --rollout teacher --loss cross_entropy
run off_policy_no_walls --prefix_len 1024 --rollout data $other/sft_clean.jsonl --teacher data/hops/teacher
run sft_no_walls --prefix_len 1024 --rollout data --loss cross_entropy $other/sft_clean.jsonl
run sft_walls --prefix_len 1024 --rollout data --loss cross_entropy $other/sft_recovered.jsonl
ends="--eval_every 0"  # these are evaluated before and after only
run mix64 --prefix_len 64 --mix 0.1 $ends
run linear --prefix_len 384 --prefix_start 16 --schedule linear $ends
few="--batch_size 8 $ends $other"  # a step takes each of the eight problems once
teacher="--teacher data/hops/teacher"
run few_whole --prefix_len 1024 $few/few.jsonl $teacher
run few_seqkd --prefix_len 1024 --rollout teacher --loss cross_entropy $few/few.jsonl $teacher
run few_sft --prefix_len 1024 --rollout data --loss cross_entropy $few/sft_few.jsonl
run prefix64_2.5e-4 --prefix_len 64 --lr 2.5e-4 $ends
run random64 --prefix_len 64 --window random $ends
run last64 --prefix_len 64 --window last $ends
run forward64 --prefix_len 64 --loss forward_kl $ends
run jsd64 --prefix_len 64 --loss jsd $ends
run whole_2.5e-4 --prefix_len 1024 --lr 2.5e-4 $ends
run prefix64_1e-3 --prefix_len 64 --lr 1e-3 $ends
run whole_1e-3 --prefix_len 1024 --lr 1e-3 $ends
steps=40
run prefix64_40 --prefix_len 64
run whole_40 --prefix_len 1024
run off_policy_40 --prefix_len 1024 --rollout teacher
run seqkd_40 --prefix_len 1024 --rollout teacher --loss cross_entropy
wait
failed=$(grep -L "^after [0-9]* steps:" "${files[@]}" || true)
[ -z "$failed" ] || { echo "not complete (run this again): $failed"; exit 1; }
arms=$(ls -d $to/{whole,prefix64,prefix16,off_policy,seqkd,off_policy_no_walls,sft_no_walls}_seed?)
python eval.py runs $arms --out $to/curves.png | tee $to/curves.txt
python eval.py positions --max_new_tokens 1024 --num_problems 50 \
    --model data/hops/student,$to/prefix64_seed1/step_000020,$to/whole_seed1/step_000020 --out $to/positions.png
python eval.py teacher_prefix --lens 0,1,16,64 --num_problems 200 --max_new_tokens 1024 --out $to/teacher_prefix.png
for arm in $to/*_seed?.txt; do grep -aH "accuracy:\|KL to\|TFLOP" $arm; done > $to/all.txt

count() {  # problems, arm: accuracy, and what is done at walls
    rm -f $2.json $2.walls
    python eval.py --model $2/step_000020 --data hops --temperature 1 --max_new_tokens 1024 --num_problems $1 \
        --out $2.json > /dev/null
    python data/hops/walls.py $2.jsonl > $2.walls
}

for arm in $to/{whole,prefix64}_seed?; do at_most_two; count 500 $arm & done
for arm in $to/{prefix128,mix64,linear,off_policy,seqkd,off_policy_no_walls}_seed1 \
    $to/{sft_no_walls,sft_walls,few_whole,few_sft}_seed1; do
    at_most_two; count 200 $arm &
done
wait
grep -h '"accuracy"' $to/{whole,prefix64}_seed?.json
cat $to/*.walls

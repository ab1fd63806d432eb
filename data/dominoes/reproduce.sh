#!/usr/bin/env bash
# `dominoes`: on-policy distillation on prefixes and on whole responses against text that the student has not written,
# three seeds each; then the picture. Two runs at a time, one thread each: an hour on 2 cores. Runs that are complete are
# not run again. The argument is a folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
to=${1:-out_reproduce_dominoes}
mkdir -p $to
python data/dominoes/prepare.py --sft
tests="--eval_data data/dominoes/test.jsonl"

run() {  # name, then flags: waits while two runs are under way
    name=$1; shift
    for seed in 1 2 3; do
        folder=$to/${name}_seed$seed
        grep -qs "after 40 steps" $folder.txt && continue
        while [ $(jobs -rp | wc -l) -ge 2 ]; do sleep 2; done
        python train.py --data dominoes --seed $seed --steps 40 --eval_every 10 --max_new_tokens 768 --out_dir $folder \
            --overwrite "$@" > $folder.txt 2>&1 &
    done
}

shown=(--teacher_prompt '{hint}{prompt}')
run whole --prefix_len 768 "${shown[@]}"
run prefix256 --prefix_len 256 "${shown[@]}"
run prefix128 --prefix_len 128 "${shown[@]}"
run prefix64 --prefix_len 64 "${shown[@]}"
run off_policy --prefix_len 768 --rollout teacher "${shown[@]}"
run seqkd --prefix_len 768 --rollout teacher --loss cross_entropy "${shown[@]}"
run sft --prefix_len 768 --rollout data --loss cross_entropy --data data/dominoes/sft_clean.jsonl $tests
run recovered --prefix_len 768 --rollout data --loss cross_entropy --data data/dominoes/sft_recovered.jsonl $tests
few="--batch_size 8 $tests"
run few_whole --prefix_len 768 --data data/dominoes/few.jsonl $few "${shown[@]}"
run few_sft --prefix_len 768 --rollout data --loss cross_entropy --data data/dominoes/sft_few.jsonl $few
wait
arms=$(ls -d $to/{whole,prefix256,prefix64,off_policy,seqkd,sft,recovered}_seed?)
python eval.py runs $arms --out $to/curves.png | tee $to/curves.txt
python eval.py positions --data dominoes --max_new_tokens 768 --num_problems 50 "${shown[@]}" \
    --model data/dominoes/student,$to/prefix64_seed1/step_000040,$to/whole_seed1/step_000040 --out $to/positions.png
python eval.py teacher_prefix --data dominoes --lens 0,1,16,64 --num_problems 200 --max_new_tokens 768 "${shown[@]}" \
    --out $to/teacher_prefix.png
for arm in $to/*_seed?.txt; do grep -aH "accuracy:\|KL to\|TFLOP" $arm; done > $to/all.txt

#!/usr/bin/env bash
# The first quarter of an hour with a GPU:    bash tests/card.sh OUT
#
# For a machine with one NVIDIA GPU, torch with CUDA and transformers 5; nothing is installed or downloaded. Each part
# has its own time limit, eight minutes in all, and writes to files in OUT as it goes; one that fails or is cut off does
# not stop the next. At the end a table and a line of JSON, from those files.
#   tests       those that need a card, and the method's
#   plain ...   the first command in bfloat16, the same with --compile, and meanwhile on the CPU, to compare with
#   bench       tests/bench.py gpu
#   smollm2     where OUT/../model is a checkpoint folder of SmolLM2 and OUT/../gsm8k.jsonl holds prompts: a student
#               pruned from it learns from the whole
# PYTHON names an interpreter. CARD_TINY=1 does it all on the simulated device, in a reduced size.
set -u
out=$(realpath -m "${1:?usage: bash tests/card.sh OUT}")
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
card=("$python")
drop=12,13,14,15,16,17
small=()
times=1
threads=8
checks=(tests/test_cuda.py tests/test_method.py)
if [ -n "${CARD_TINY:-}" ]; then
    export TORCHDYNAMO_DISABLE=1 # the simulated device has no compiler
    card=("$python" -m tests.fake_cuda)
    drop=1
    times=9
    threads=1
    small=(--steps 1 --batch_size 1 --prefix_len 4 --eval_problems 1 --eval_kl 1 --max_new_tokens 4)
    checks=(--collect-only tests/test_card.py)
fi

part() { # NAME SECONDS COMMAND...: what it prints goes to OUT/NAME.txt
    local name=$1 limit=$(($2 * times)) start=$SECONDS
    shift 2
    echo "$name: $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.txt" 2>&1
    echo "$name: status $?, $((SECONDS - start)) of $limit s" | tee -a "$out/parts.txt"
}

{
    "$python" -c 'from importlib import metadata as m, util
for name in ("torch", "transformers", "triton", "math-verify"):
    print(name, m.version(name) if util.find_spec(name.replace("-", "_")) else "is missing")'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv || echo "no nvidia-smi"
    git log -1 --format="commit %h, %s"
} > "$out/versions.txt" 2>&1
: > "$out/parts.txt"

first=(train.py --prefix_len 1024 --steps 10 --overwrite "${small[@]}")
OMP_NUM_THREADS=$threads part cpu 300 "$python" "${first[@]}" --device cpu --out_dir "$out/cpu" &
part tests 100 "$python" -m pytest -q "${checks[@]}"
part plain 55 "${card[@]}" "${first[@]}" --out_dir "$out/plain"
part compiled 115 "${card[@]}" "${first[@]}" --out_dir "$out/compiled" --compile
part bench 135 "${card[@]}" tests/bench.py gpu
if [ -f "$out/../model/config.json" ] && [ -f "$out/../gsm8k.jsonl" ]; then
    [ -d "$out/../pruned" ] || part prune 15 "$python" data/prune.py "$out/../model" "$out/../pruned" --drop "$drop"
    part smollm2 60 "${card[@]}" train.py --student "$out/../pruned" --teacher "$out/../model" --lr 1e-4 \
        --data "$out/../gsm8k.jsonl" --prefix_len 128 --batch_size 64 --steps 40 --warmup 5 --eval_problems 0 --eval_kl 0 \
        --out_dir "$out/smollm2" --overwrite "${small[@]}"
fi
wait
rm -rf "$out"/*/step_* # checkpoints; what was found is small enough to take home
"$python" tests/card.py "$out" | tee "$out/table.txt"

#!/usr/bin/env bash
# The first eight minutes with a GPU:    bash tests/card.sh OUT
#
# For a machine with one NVIDIA GPU and what requirements.txt names; nothing is installed or downloaded. Each part has
# its own time limit, eight minutes in all, and writes to files in OUT as it goes; one that fails or is cut off does not
# stop the next. After each, OUT.tgz is made anew. At the end a table and a line of JSON, from those files.
#   tests       those that need a card
#   plain       the first command, 10 steps, in bfloat16; meanwhile it runs on the CPU, to compare with
#   resumed     its last step once more, from the checkpoint before it: bit for bit?
#   bench       tests/bench.py gpu: real shapes, random weights
#   graphs      the first command with CUDA graphs and no compiler
#   compiled    and with both: --compile
# PYTHON names an interpreter. CARD_TINY=1 does it all on the simulated device, in a reduced size.
set -u
out=$(realpath -m "${1:?usage: bash tests/card.sh OUT}") || exit
cd "$(dirname "$0")/.." || exit
[ -e "$out/parts.txt" ] || [ -z "$(ls -A "$out" 2> /dev/null)" ] || { echo "$out holds something else"; exit 1; }
mkdir -p "$out" && touch "$out/parts.txt" || exit
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
card=("$python")
small=()
times=1
threads=4
checks=(-v -n 4 --dist load tests/test_cuda.py)
if [ -n "${CARD_TINY:-}" ]; then
    export TORCHDYNAMO_DISABLE=1 # the simulated device has no compiler
    card=("$python" -m tests.fake_cuda)
    times=9
    threads=1
    small=(--steps 2 --batch_size 1 --prefix_len 4 --eval_problems 1 --eval_kl 1 --max_new_tokens 4)
    checks=(-q --collect-only tests/test_card.py)
elif ! "$python" -c "import torch; torch.zeros(1, device='cuda')"; then
    echo "no CUDA device that torch can use" && exit 1
fi

part() { # NAME SECONDS COMMAND...: what it prints goes to OUT/NAME.txt
    local name=$1 limit=$(($2 * times)) start=$SECONDS
    shift 2
    echo "$name: $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.txt" 2>&1
    echo "$name: status $?, $((SECONDS - start)) of $limit s" | tee -a "$out/parts.txt"
    [ "$name" = cpu ] || tar czf "$out.tgz" --exclude 'step_*' -C "$out" .
}

{
    "$python" -c 'from importlib import metadata as m, util
for name in ("torch", "transformers", "triton", "math-verify"):
    print(name, m.version(name) if util.find_spec(name.replace("-", "_")) else "is missing")'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv \
        || echo "no nvidia-smi"
    git log -1 --format="commit %h, %s"
} > "$out/versions.txt" 2>&1
: > "$out/parts.txt"

first=(train.py --prefix_len 1024 --steps 10 --overwrite "${small[@]}")
OMP_NUM_THREADS=$threads part cpu 300 "$python" "${first[@]}" --device cpu --out_dir "$out/cpu" &
part tests 90 "$python" -m pytest "${checks[@]}"
part plain 55 "${card[@]}" "${first[@]}" --device cuda --out_dir "$out/plain" --save_every 1 # the last two stay
if [ -d "$out/plain" ]; then
    rm -rf "$out/resumed" && cp -r "$out/plain" "$out/resumed" && rm -r "$(ls -d "$out"/resumed/step_* | tail -1)"
    rm "$out/resumed/log.jsonl"
    part resumed 35 "${card[@]}" train.py --resume --out_dir "$out/resumed"
fi
part bench 160 "${card[@]}" tests/bench.py gpu
TORCHDYNAMO_DISABLE=1 part graphs 40 "${card[@]}" "${first[@]}" --device cuda --out_dir "$out/graphs" --compile
part compiled 100 "${card[@]}" "${first[@]}" --device cuda --out_dir "$out/compiled" --compile
wait
rm -rf "$out"/{cpu,plain,resumed,graphs,compiled}/step_* # checkpoints; what was found is small enough to take home
"$python" tests/card.py "$out" | tee "$out/table.txt"
tar czf "$out.tgz" -C "$out" .

#!/usr/bin/env bash
# Prefixes, whole responses, random windows and --mix on walks, three seeds each, then a picture. 12 minutes on one core
# of an Intel Xeon. What is there already is not run again, so it can be interrupted.
set -euo pipefail
cd "$(dirname "$0")/../.."
to=out_reproduce_walk
mkdir -p $to
[ -f data/walk/train.jsonl ] || python data/walk/prepare.py

run() {  # name, then flags
    name=$1; shift
    for seed in 1 2 3; do
        grep -qs '"step": 30, "eval": "student", "kind": "kl"' "$to/${name}_seed$seed/log.jsonl" && continue
        python train.py --data walk --batch_size 64 --lr 5e-4 --steps 30 --lr_schedule constant \
            --seed $seed --eval_every 10 --eval_problems 150 --eval_kl 50 --max_new_tokens 200 \
            --out_dir "$to/${name}_seed$seed" --overwrite "$@"
    done
}

run prefix16 --prefix_len 16
run prefix64 --prefix_len 64
run prefix200 --prefix_len 200
run random16 --prefix_len 16 --window random
run mix10 --prefix_len 16 --mix 0.1

python eval.py runs $to/*_seed? --out $to/walk.png | tee $to/walk.txt

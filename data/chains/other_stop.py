"""chains' student, made to stop with another token than its teacher, to see what merging the two is for.

    python data/chains/other_stop.py out_other_stop             # as sure of its stop as it was
    python data/chains/other_stop.py out_other_stop --scale 0.4 # two thirds sure
    python train.py --data chains --student out_other_stop --stop_class off --prefix_len 256 --max_new_tokens 256
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

OTHER, OWN = 0, 2  # <|endoftext|>, and <|im_end|>, with which the pair was trained to stop


def main(out: Path, scale: float) -> None:
    shutil.copytree(Path(__file__).resolve().parent / "student", out)
    weights = load_file(out / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]  # the head as well
    rows[[OTHER, OWN]] = rows[[OWN, OTHER]].clone()
    rows[OTHER] *= scale
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name, stop in (("config", OTHER), ("generation_config", OTHER), ("tokenizer_config", "<|endoftext|>")):
        settings = json.loads((out / f"{name}.json").read_text())
        settings["eos_token" if name == "tokenizer_config" else "eos_token_id"] = stop
        (out / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--scale", type=float, default=1.0, help="of the stop's row of the head: below 1, less sure")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already")
    main(args.out, args.scale)

"""Make a student out of a teacher: the same checkpoint with some of its layers removed.

    python data/prune.py SmolLM2-135M-Instruct pruned --drop 12,13,14,15,16,17

The layers that are left keep their weights, so the result speaks, but badly; distillation mends it.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import InputError, fail, reading
from data.checkpoint import load_config, weight_files, write_config
from data.tokenizer import Tokenizer


def prune(source: str, out: str, drop: set[int]) -> int:
    """Write the checkpoint folder `source` without the layers `drop` (numbered from 0) to `out`, in bfloat16. Returns
    the number of layers left."""
    folder, target = Path(source), Path(out)
    config, tokenizer = load_config(folder), Tokenizer(folder)
    layers = config.num_hidden_layers
    if not drop < set(range(layers)):
        raise InputError(f"--drop: expected some of the layers 0 to {layers - 1}, found {sorted(drop)}")
    if target.exists():
        raise InputError(f"{out} exists already")
    kept = [layer for layer in range(layers) if layer not in drop]
    place, weights = {layer: i for i, layer in enumerate(kept)}, {}
    for file in weight_files(folder):
        with reading(file):
            tensors = load_file(file)
        for name, tensor in tensors.items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer is None or int(layer[1]) in place:
                name = f"model.layers.{place[int(layer[1])]}.{name[layer.end():]}" if layer else name
                weights[name] = tensor.to(torch.bfloat16)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    target.mkdir(parents=True)
    tokenizer.save(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    write_config(config, target, torch.bfloat16)
    return len(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--drop", required=True, help="comma-separated numbers of the layers to remove")
    args = parser.parse_args()
    try:
        print(f"{args.out}: {prune(args.source, args.out, {int(n) for n in args.drop.split(',')})} layers")
    except ValueError as error:  # InputError is one; so is int("x")
        fail(str(error))

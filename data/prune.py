"""Make a student out of a teacher: the same checkpoint with some of its layers removed.

    python data/prune.py SmolLM2-135M-Instruct pruned --drop 12,13,14,15,16,17

The layers that are left keep their weights, so the result speaks, but badly; distillation mends it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import InputError, stop
from data.tokenizer import Tokenizer
from model import Transformer, checkpoint_folder


def prune(source: str, out: str, drop: set[int]) -> Transformer:
    """Write `source` without the layers `drop` (numbered from 0) to the folder `out`, in bfloat16, and return it."""
    folder = checkpoint_folder(source)
    tokenizer, model = Tokenizer(folder), Transformer.from_pretrained(folder)
    layers = model.config.num_hidden_layers
    if not drop < set(range(layers)):
        raise InputError(f"--drop: expected some of the layers 0 to {layers - 1}, found {sorted(drop)}")
    if Path(out).exists():
        raise InputError(f"{out} exists already")
    kept = [layer for layer in range(layers) if layer not in drop]
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in kept)
    for index, block in enumerate(model.model.layers):
        block.self_attn.layer = index
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in kept]
    model.save_pretrained(out, torch.bfloat16)
    tokenizer.save(out)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder or hub name")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--drop", required=True, help="comma-separated numbers of the layers to remove")
    args = parser.parse_args()
    try:
        pruned = prune(args.source, args.out, {int(n) for n in args.drop.split(",")})
    except ValueError as error:  # InputError is one; so is int("x")
        stop(str(error))
    count = sum(p.numel() for p in pruned.parameters())
    print(f"{args.out}: {pruned.config.num_hidden_layers} layers, {count:,} parameters")

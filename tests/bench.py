"""Measurements, as ratios against a peer on the same machine. Run on a quiet machine; nothing here is a test.

    python tests/bench.py load     # peak memory and seconds of loading a checkpoint, ours and transformers'
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Transformer

LOADERS = {
    "import only": "pass",
    "model.py": "from model import Transformer; model = Transformer.from_pretrained(folder, dtype=torch.{dtype})",
    "transformers": "model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype})",
}
PROBE = r"""
import json, re, time
import torch, transformers
import transformers.models.qwen3.modeling_qwen3, model
folder = {folder!r}
start = time.perf_counter()
{load}
if "import" not in {name!r}:
    total = sum(p.float().sum() for p in model.parameters())  # read every weight once
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024  # Linux; of this process alone
print(json.dumps([peak, seconds]))
"""


def bench_load() -> None:
    config = Qwen3Config(
        vocab_size=50_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(config).initialize(0)
        config.save_pretrained(folder)
        weights = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
        names, index, size = list(weights), {}, 0
        for shard in range(4):
            part = {n: weights[n] for n in names[shard::4]}
            file = f"model-{shard + 1:05d}-of-00004.safetensors"
            save_file(part, Path(folder) / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
            size = max(size, sum(t.numel() * 2 for t in part.values()))
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        count = sum(t.numel() for t in weights.values())
        print(f"{count / 1e6:.0f} M parameters, bfloat16 on disk in 4 shards, the largest {size / 2**20:.0f} MiB")
        for dtype, bytes_each in (("float32", 4), ("bfloat16", 2)):
            base = 0
            for name, load in LOADERS.items():
                code = PROBE.format(folder=folder, load=load.format(dtype=dtype), name=name)
                root = Path(__file__).resolve().parent.parent
                out = subprocess.run(
                    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
                ).stdout
                peak, seconds = json.loads(out)
                if name == "import only":
                    base = peak
                    continue
                above = (peak - base - count * bytes_each) / 2**20
                print(
                    f"  {dtype:8} {name:12} peak {(peak - base) / 2**20:6.0f} MiB above imports, "
                    f"{above:6.0f} above the weights; {seconds:.2f} s with one read of every weight"
                )


if __name__ == "__main__":
    benches = {"load": bench_load}
    if len(sys.argv) != 2 or sys.argv[1] not in benches:
        sys.exit(f"usage: python tests/bench.py {'|'.join(benches)}")
    torch.manual_seed(0)
    benches[sys.argv[1]]()

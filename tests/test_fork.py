"""README's "Fork it": every diff there is small, applies to the code as it is, and runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"`(python train.py [^`]*)`:\n\n```diff\n(.*?)```", README, re.DOTALL)

K2 = """
import torch
from loss import distill_loss
h, w, t, v = (torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
              for i, n in enumerate((1, 6, 1, 6)))
h, y, p = h.requires_grad_(), torch.arange(6), (h @ w.T).softmax(-1)[0]
options = {"targets": y, "token_weights": p.detach(), "chunk_rows": 6}
k2, kl = (torch.autograd.grad(distill_loss(h.expand(6, 4), w, t.expand(6, 4), v, loss=name, **options)[0], h)[0]
          for name in ("k2", "reverse_kl"))
assert torch.allclose(k2, kl, atol=1e-12) and kl.norm() > 1e-3
"""


@pytest.mark.parametrize("number", range(2))
def test_a_fork_is_a_small_diff_that_runs(number, tmp_path):
    assert len(BLOCKS) == 2
    command, diff = BLOCKS[number]
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert len(changed) <= 10
    for name in ("loss.py", "model.py", "sample.py", "eval.py", "train.py", "data"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    applied = subprocess.run(["git", "apply", "--recount", "-"], cwd=tmp_path, input=diff, text=True,
                             capture_output=True, check=False)
    assert applied.returncode == 0, applied.stderr
    flags = command.split()[2:]
    quick = ["--steps", "2", "--batch_size", "4", "--eval_problems", "0", "--eval_kl", "0", "--data", "chains"]
    run = subprocess.run([sys.executable, "train.py", *flags, *quick], cwd=tmp_path, capture_output=True,
                         text=True, check=False)
    assert run.returncode == 0 and "after 2 steps" in run.stdout, run.stderr
    if "k2" in flags:  # over all tokens, each as likely as the student has it, its gradient is the reverse KL's
        found = subprocess.run([sys.executable, "-c", K2], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr

import weakref

import mpmath
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss import LOSSES, distill_loss
from tests.reference import dense_loss


def make(n=11, v=23, h=6, v_t=20, h_t=5, scale=1.0, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden_s = torch.randn(n, h, generator=g, dtype=dtype).requires_grad_()
    head_s = (scale * torch.randn(v, h, generator=g, dtype=dtype)).requires_grad_()
    hidden_t = torch.randn(n, h_t, generator=g, dtype=dtype)
    head_t = scale * torch.randn(v_t, h_t, generator=g, dtype=dtype)
    targets = torch.randint(0, 19, (n,), generator=g)
    weights = torch.rand(n, generator=g, dtype=dtype)
    return hidden_s, head_s, hidden_t, head_t, targets, weights


class Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor storage made while it is active, until it dies."""

    def __enter__(self):
        self.alive, self.peak, self.seen = 0, 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known | self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def free(self, key, nbytes):
        self.seen.discard(key)
        self.alive -= nbytes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stop_ids", [(), (3, 7, 9)])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: peaked distributions, most probabilities are 0 in float64
@pytest.mark.parametrize("chunk_rows, top_k", [(1, 5), (4, 5), (100, 100)])
def test_values_and_gradients_equal_dense_autograd(loss, stop_ids, scale, chunk_rows, top_k):
    hidden_s, head_s, hidden_t, head_t, targets, weights = make(scale=scale)
    targets[:3] = torch.tensor([3, 7, 9])
    weights[4:6] = 0
    options = {
        "loss": loss,
        "token_weights": weights,
        "temperature": 0.7,
        "beta": 0.3,
        "top_k": top_k,
        "targets": targets,
        "stop_ids": stop_ids,
        "vocab": 19,
    }
    expected = dense_loss(hidden_s, head_s, hidden_t, head_t, **options)
    found, stats = distill_loss(hidden_s, head_s, hidden_t, head_t, chunk_rows=chunk_rows, **options)
    assert torch.allclose(found, expected, rtol=1e-12)
    inputs = (hidden_s, head_s)
    for a, b in zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10 * scale)
    assert torch.allclose((stats["loss"] * weights).sum(), expected, rtol=1e-12)
    assert all(len(value) == 11 and not value.requires_grad for value in stats.values())


def on_a_grid(kind: str, v: int = 301, h: int = 16, n: int = 13, seed: int = 0):
    """float32 inputs of so few bits that every logit is exact in float32: what is left is the error of the loss."""
    g = torch.Generator().manual_seed(seed)

    def grid(*shape, step, most):
        return torch.randint(-most, most + 1, shape, generator=g).float() * step

    hidden_s, head_s = grid(n, h, step=2**-3, most=15), grid(v, h, step=2**-4, most=15)
    hidden_t, head_t = hidden_s, grid(v, h, step=2**-4, most=15)
    if kind == "nearly identical":
        head_t = head_s + grid(v, h, step=2**-9, most=2)  # logits differ by about 0.01
    hidden_s, hidden_t = hidden_s.clone(), hidden_t.clone()
    if kind in ("peaked", "disjoint"):  # the first coordinate is for one token each: +60, for both the same or not
        hidden_s[:, 0] = hidden_t[:, 0] = 8
        head_s[:, 0] = head_t[:, 0] = 0
        head_s[5, 0], head_t[5 if kind == "peaked" else 77, 0] = 7.5, 7.5
    return hidden_s, head_s, hidden_t, head_t, torch.randint(0, v, (n,), generator=g)


def in_fifty_digits(hidden_s, head_s, hidden_t, head_t, targets, loss, beta, top_k):
    """Values (N,) and gradients with respect to the logits (N, V) from the definitions, where float64 has too few
    digits: at +60 it cannot tell a probability from 1."""
    mpmath.mp.dps, beta = 50, mpmath.mpf(beta)
    values, gradients = [], []
    for z, t, y in zip((hidden_s.double() @ head_s.double().T).tolist(),
                       (hidden_t.double() @ head_t.double().T).tolist(), targets.tolist()):
        p, q = ([mpmath.exp(x) for x in row] for row in (z, t))
        Z, Y = mpmath.fsum(p), mpmath.fsum(q)
        p, q = [x / Z for x in p], [x / Y for x in q]
        s = [mpmath.log(a / b) for a, b in zip(p, q)]
        value = mpmath.fsum(a * b for a, b in zip(p, s))
        if loss == "topk_reverse_kl":
            kept = set(sorted(range(len(t)), key=lambda i: -t[i])[:top_k])
            P, Q = (mpmath.fsum(x for i, x in enumerate(r) if i not in kept) for r in (p, q))
            s = [x if i in kept else mpmath.log(P / Q) for i, x in enumerate(s)]
            value = mpmath.fsum(a * b for a, b in zip(p, s))
        elif loss == "jsd":
            m = [(1 - beta) * a + beta * b for a, b in zip(p, q)]
            s = [(1 - beta) * mpmath.log(a / b) for a, b in zip(p, m)]
            value = mpmath.fsum(a * b for a, b in zip(p, s))
            value += beta * mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(q, m))
        elif loss not in ("reverse_kl", "forward_kl", "sampled_kl", "cross_entropy"):
            raise NotImplementedError(f"write the definition of {loss} here")
        mean = mpmath.fsum(a * b for a, b in zip(p, s))
        dz = [a * (b - mean) for a, b in zip(p, s)]
        if loss == "forward_kl":
            value, dz = -mpmath.fsum(a * b for a, b in zip(q, s)), [a - b for a, b in zip(p, q)]
        elif loss in ("sampled_kl", "cross_entropy"):
            advantage = -s[y] if loss == "sampled_kl" else 1
            value = -advantage * mpmath.log(p[y])
            dz = [advantage * (a - (i == y)) for i, a in enumerate(p)]
        values.append(float(value))
        gradients.append([float(x) for x in dz])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["random", "peaked", "nearly identical", "disjoint"])
@pytest.mark.parametrize("loss", LOSSES)
def test_float32_and_bfloat16_against_fifty_digits(loss, kind):
    *inputs, targets = on_a_grid(kind)
    values, dz = in_fifty_digits(*inputs, targets, loss, beta=0.3, top_k=20)
    options = {"loss": loss, "beta": 0.3, "top_k": 20, "targets": targets}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        hidden_s, head_s, hidden_t, head_t = (x.to(dtype) for x in inputs)
        if dtype == torch.bfloat16 and not torch.equal(head_t.float(), inputs[3]):
            values, dz = in_fifty_digits(hidden_s, head_s, hidden_t, head_t, targets, loss, beta=0.3, top_k=20)
        hidden_s.requires_grad_(), head_s.requires_grad_()
        found, stats = distill_loss(hidden_s, head_s, hidden_t, head_t, **options)
        error = (stats["loss"].double() - values).abs()  # below 1e-8 nats a value is rounding; gradients are not
        assert (error <= tolerance * values.norm() / len(values) ** 0.5 + 1e-8).all()
        assert (error <= 10 * tolerance * values.abs() + 1e-8).all()
        assert stats["kl"].min() >= 0 and (stats["loss"].min() >= 0 or loss == "sampled_kl")
        expected = (dz @ head_s.detach().double() / len(dz), dz.T @ hidden_s.detach().double() / len(dz))
        for a, b in zip(torch.autograd.grad(found, (hidden_s, head_s)), expected):
            assert (a.double() - b).norm() < tolerance * b.norm()
            rows = b.norm(dim=1) > 1e-30 * tolerance  # each row of dH and each token's of dW on its own
            assert ((a.double() - b).norm(dim=1)[rows] < 10 * tolerance * b.norm(dim=1)[rows]).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_random_float32(loss):
    """Inputs of full precision, where the logits round as well, and more rows than a CPU's block has."""
    hidden_s, head_s, hidden_t, head_t, targets, weights = make(n=40, v=1000, v_t=1010, h=32, h_t=48, scale=0.3)
    options = {"loss": loss, "targets": targets, "stop_ids": (1, 5), "temperature": 1.3}
    expected = dense_loss(hidden_s, head_s, hidden_t, head_t, token_weights=weights, **options)
    single = [x.detach().float().requires_grad_() for x in (hidden_s, head_s)]
    found, _ = distill_loss(*single, hidden_t.float(), head_t.float(), token_weights=weights.float(), **options)
    assert abs(found.item() - expected.item()) < 1e-5 * abs(expected.item())
    for a, b in zip(torch.autograd.grad(found, single), torch.autograd.grad(expected, (hidden_s, head_s))):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_only_what_needs_a_gradient_gets_one():
    hidden_s, head_s, hidden_t, head_t, *_ = make()
    whole = torch.autograd.grad(distill_loss(hidden_s, head_s, hidden_t, head_t)[0], (hidden_s, head_s))
    alone, = torch.autograd.grad(distill_loss(hidden_s, head_s.detach(), hidden_t, head_t)[0], hidden_s)
    assert torch.equal(alone, whole[0])
    alone, = torch.autograd.grad(distill_loss(hidden_s.detach(), head_s, hidden_t, head_t)[0], head_s)
    assert torch.equal(alone, whole[1])


def test_memory_is_that_of_a_chunk_whatever_the_number_of_rows():
    """Counted: every byte that is alive at once beyond inputs and gradients."""
    v, chunk_rows, peaks = 4000, 64, []
    head_s = torch.randn(v, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for n in (256, 1024):
        hidden_s = torch.randn(n, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for loss in LOSSES:
            with Allocations() as allocations:
                total, _ = distill_loss(hidden_s, head_s, hidden_s.detach(), head_s.detach(), loss=loss,
                                        targets=torch.zeros(n).long(), chunk_rows=chunk_rows)
                total.backward()
            kept = 4 * (hidden_s.numel() + head_s.numel()) + 20 * 4 * n  # gradients, statistics
            peaks.append(allocations.peak - kept)
            assert peaks[-1] < 4 * 4 * chunk_rows * v, (loss, n, peaks[-1])  # four (chunk, V) buffers in float32
            hidden_s.grad = head_s.grad = None


def test_statistics_are_what_their_names_say():
    hidden_s, head_s, hidden_t, head_t, targets, _ = make(v=20)
    _, stats = distill_loss(hidden_s, head_s, hidden_t, head_t, targets=targets, chunk_rows=3)
    log_p, log_q = (hidden_s @ head_s.T).log_softmax(-1), (hidden_t @ head_t.T).log_softmax(-1)
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1), "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_entropy": -(log_q.exp() * log_q).sum(-1), "agree": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        "student_logprob": log_p.gather(-1, targets[:, None])[:, 0],
        "teacher_logprob": log_q.gather(-1, targets[:, None])[:, 0],
    }
    for name, value in expected.items():
        assert torch.allclose(stats[name], value, atol=1e-12), name


def test_no_rows_give_a_zero_that_backpropagates():
    hidden_s, head_s, hidden_t, head_t, targets, _ = make(n=0)
    loss, stats = distill_loss(hidden_s, head_s, hidden_t, head_t, targets=targets)
    loss.backward()
    assert loss == 0 and head_s.grad.abs().sum() == 0 and hidden_s.grad.shape == (0, 6) and stats["kl"].shape == (0,)


def test_disjoint_supports_stay_finite():
    head = torch.eye(4, dtype=torch.float32)
    hidden_s = torch.tensor([[1e4, 0, 0, 0]], requires_grad=True)
    hidden_t = torch.tensor([[0, 1e4, 0, 0.0]])
    for loss in LOSSES:
        value, stats = distill_loss(hidden_s, head, hidden_t, head, loss=loss, targets=torch.tensor([0]))
        gradient, = torch.autograd.grad(value, hidden_s)
        assert value.isfinite() and gradient.isfinite().all() and all(s.isfinite().all() for s in stats.values())


def test_cannot_be_differentiated_twice():
    hidden_s, head_s, hidden_t, head_t, *_ = make()
    loss, _ = distill_loss(hidden_s, head_s, hidden_t, head_t)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden_s, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):  # and not silently scaled twice
        loss.backward()


def test_a_loss_times_a_number_has_gradients_times_it():
    hidden_s, head_s, hidden_t, head_t, *_ = make(200, 60, 40, 60, 40, dtype=torch.bfloat16)
    grads = [torch.autograd.grad(distill_loss(hidden_s, head_s, hidden_t, head_t)[0] * c, (hidden_s, head_s))
             for c in (1, 1 / 3)]
    for a, b in zip(*grads):  # 1/3 as a bfloat16 is 0.0019 off
        assert float((a.double() * b.double()).sum() / a.double().square().sum()) == pytest.approx(1 / 3, rel=3e-4)


def test_autocast_changes_nothing():
    hidden_s, head_s, hidden_t, head_t, *_ = make(dtype=torch.float32)
    plain, _ = distill_loss(hidden_s, head_s, hidden_t, head_t)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = distill_loss(hidden_s, head_s, hidden_t, head_t)
    assert torch.equal(plain, cast)
    for a, b in zip(torch.autograd.grad(plain, (hidden_s, head_s)), torch.autograd.grad(cast, (hidden_s, head_s))):
        assert torch.equal(a, b)


def test_sampled_kl_averages_to_the_exact_gradient():
    hidden_s, head_s, hidden_t, head_t, *_ = make(n=2, v=9, v_t=9)
    exact = torch.autograd.grad(distill_loss(hidden_s, head_s, hidden_t, head_t)[0], (hidden_s, head_s))
    p = (hidden_s @ head_s.T).softmax(-1).detach()  # (2, 9)
    # the expectation, one token of the vocabulary at a time
    mean = sum(distill_loss(hidden_s, head_s, hidden_t, head_t, loss="sampled_kl", targets=torch.full((2,), y),
                            token_weights=p[:, y] / 2)[0] for y in range(9))
    for a, b in zip(torch.autograd.grad(mean, (hidden_s, head_s)), exact):
        assert torch.allclose(a, b, atol=1e-14)


@pytest.mark.parametrize("options, message", [
    ({"loss": "kl"}, "'kl' is none of"),
    ({"loss": "cross_entropy"}, "needs targets"),
    ({"hidden_t": None, "head_t": None}, "needs the teacher"),
    ({"loss": "jsd", "beta": 1.0}, "beta must lie strictly between"),
    ({"stop_ids": (2, 20)}, "stop_ids .* must lie below"),
    ({"temperature": 0}, "temperature must be positive, found 0"),
    ({"top_k": 0}, "top_k must be at least 1, found 0"),
    ({"targets": torch.arange(12)}, "one row each, found .11, 12. rows"),
    ({"targets": torch.arange(11) * 2}, "targets must lie below the vocabulary of 20, found 0 to 20"),
    ({"vocab": 21}, "vocab must lie between 1 and 20.*found 21"),
])
def test_unusable_arguments_are_named(options, message):
    hidden_s, head_s, hidden_t, head_t, *_ = make()
    with pytest.raises(ValueError, match=message):
        distill_loss(hidden_s, head_s, **{"hidden_t": hidden_t, "head_t": head_t} | options)


def test_a_loss_without_its_branch_is_not_another(monkeypatch):
    hidden_s, head_s, hidden_t, head_t, *_ = make()
    monkeypatch.setattr("loss.LOSSES", (*LOSSES, "k2"))
    with pytest.raises(NotImplementedError, match="'k2' has no branch"):
        distill_loss(hidden_s, head_s, hidden_t, head_t, loss="k2")

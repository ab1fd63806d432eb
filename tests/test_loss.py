import pytest
import torch

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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stop_ids", [(), (3, 7, 9)])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: peaked distributions, most probabilities are 0 in float64
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_values_and_gradients_equal_dense_autograd(loss, stop_ids, scale, chunk_rows):
    hidden_s, head_s, hidden_t, head_t, targets, weights = make(scale=scale)
    targets[:3] = torch.tensor([3, 7, 9])
    options = {
        "loss": loss,
        "token_weights": weights,
        "temperature": 0.7,
        "beta": 0.3,
        "targets": targets,
        "stop_ids": stop_ids,
        "vocab": 19,
    }
    expected = dense_loss(hidden_s, head_s, hidden_t, head_t, **options)
    found, stats = distill_loss(hidden_s, head_s, hidden_t, head_t, chunk_rows=chunk_rows, **options)
    assert torch.allclose(found, expected, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * found, (hidden_s, head_s)), torch.autograd.grad(3 * expected, (hidden_s, head_s))
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10 * scale)
    assert torch.allclose((stats["loss"] * weights).sum(), expected, rtol=1e-12)
    assert all(len(value) == 11 and not value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    "loss", [name for name in LOSSES if name != "sampled_kl"]
)  # sampled_kl is a surrogate by design
def test_gradcheck(loss):
    hidden_s, head_s, hidden_t, head_t, targets, weights = make(n=3, v=7, h=3, v_t=7)

    def value(h, w):
        return distill_loss(
            h, w, hidden_t, head_t, loss=loss, token_weights=weights[:3], targets=targets % 7, stop_ids=(1, 4)
        )[0]

    assert torch.autograd.gradcheck(value, (hidden_s, head_s))


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


def test_student_equal_to_teacher_has_no_loss_and_no_gradient():
    hidden_s, head_s, *_ = make()
    for loss in ("reverse_kl", "forward_kl", "jsd"):
        value, _ = distill_loss(hidden_s, head_s, hidden_s.detach(), head_s.detach(), loss=loss)
        assert abs(value.item()) < 1e-14
        for gradient in torch.autograd.grad(value, (hidden_s, head_s)):
            assert gradient.abs().max() < 1e-14


def test_sampled_kl_averages_to_the_exact_gradient():
    hidden_s, head_s, hidden_t, head_t, *_ = make(n=2, v=9, v_t=9)
    exact = torch.autograd.grad(distill_loss(hidden_s, head_s, hidden_t, head_t)[0], (hidden_s, head_s))
    p = (hidden_s @ head_s.T).softmax(-1).detach()  # (2, 9)
    average = [torch.zeros_like(g) for g in exact]
    for y in range(9):  # the expectation, one token of the vocabulary at a time
        loss, _ = distill_loss(
            hidden_s,
            head_s,
            hidden_t,
            head_t,
            loss="sampled_kl",
            targets=torch.full((2,), y),
            token_weights=p[:, y] / 2,
        )
        for total, g in zip(average, torch.autograd.grad(loss, (hidden_s, head_s))):
            total += g
    for a, b in zip(average, exact):
        assert torch.allclose(a, b, atol=1e-14)


def test_splitting_the_rows_changes_nothing():
    hidden_s, head_s, hidden_t, head_t, _, weights = make()
    whole, _ = distill_loss(hidden_s, head_s, hidden_t, head_t, token_weights=weights)
    parts = sum(
        distill_loss(hidden_s[s], head_s, hidden_t[s], head_t, token_weights=weights[s])[0]
        for s in (slice(0, 2), slice(2, 3), slice(3, 11))
    )
    for a, b in zip(torch.autograd.grad(whole, (hidden_s, head_s)), torch.autograd.grad(parts, (hidden_s, head_s))):
        assert torch.allclose(a, b, atol=1e-14)


def test_two_stop_ids_of_one_class_are_not_punished():
    """Both stop with certainty, by different ids: without the class tens of nats, with it nothing."""
    eye = torch.eye(6, dtype=torch.float64) * 60
    hidden_s, hidden_t = torch.eye(6, dtype=torch.float64)[[2]], torch.eye(6, dtype=torch.float64)[[5]]
    apart, _ = distill_loss(hidden_s, eye, hidden_t, eye)
    merged, _ = distill_loss(hidden_s, eye, hidden_t, eye, stop_ids=(2, 5))
    assert apart > 50 and abs(merged) < 1e-12


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


def test_half_precision_inputs_keep_the_gradient():
    """Nearly equal models in bfloat16: the gradient is a small difference and must not drown in rounding."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 64, generator=g).bfloat16()
    head = torch.randn(500, 64, generator=g).bfloat16()
    head_t = (head.float() * (1 + 0.02 * torch.randn(500, 64, generator=g))).bfloat16()
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    distill_loss(h, w, hidden, head_t)[0].backward()
    hd, wd = hidden.double().requires_grad_(), head.double().requires_grad_()
    dense_loss(
        hd,
        wd,
        hidden.double(),
        head_t.double(),
        loss="reverse_kl",
        token_weights=torch.full((32,), 1 / 32, dtype=torch.float64),
    ).backward()
    assert (h.grad - hd.grad).norm() / hd.grad.norm() < 2e-2
    assert (w.grad - wd.grad).norm() / wd.grad.norm() < 2e-2


def test_cannot_be_differentiated_twice():
    hidden_s, head_s, hidden_t, head_t, *_ = make()
    loss, _ = distill_loss(hidden_s, head_s, hidden_t, head_t)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden_s, create_graph=True)


def test_unusable_arguments_are_named():
    hidden_s, head_s, hidden_t, head_t, *_ = make()
    with pytest.raises(ValueError, match="'kl' is none of"):
        distill_loss(hidden_s, head_s, hidden_t, head_t, loss="kl")
    with pytest.raises(ValueError, match="needs targets"):
        distill_loss(hidden_s, head_s, hidden_t, head_t, loss="cross_entropy")
    with pytest.raises(ValueError, match="needs the teacher"):
        distill_loss(hidden_s, head_s)
    with pytest.raises(ValueError, match="strictly between"):
        distill_loss(hidden_s, head_s, hidden_t, head_t, loss="jsd", beta=1.0)
    with pytest.raises(ValueError, match="must lie below"):
        distill_loss(hidden_s, head_s, hidden_t, head_t, stop_ids=(2, 20))

"""Divergences between a student and a teacher, from hidden states, without ever holding an (N, V) tensor.

One row is one supervised position. The student's hidden state h and head W give logits z = W h / T, the teacher's give
t the same way; p = softmax(z), q = softmax(t). The loss of on-policy distillation is the reverse Kullback-Leibler
divergence

    D = KL(p || q) = sum_v p_v (log p_v - log q_v)

Its gradient with respect to the logits has a closed form. With dp_v/dz_u = p_v (1[u = v] - p_u),

    dD/dz_u = sum_v (log p_v - log q_v + 1) p_v (1[u = v] - p_u) = p_u (log p_u - log q_u - D)

(the "+ 1" cancels, because the p_v sum to one). So autograd has nothing to record: `forward` below walks over chunks of
rows, forms z and t, writes dz, and multiplies it straight back, dh = dz W and dW += dz^T h. `backward` only scales.
That is four products with a head per row, and the live memory is a few (chunk, V) buffers plus dh and dW, however many
rows there are.

    loss            value of a row                          gradient dz (times weight / T)
    reverse_kl      sum p (log p - log q)  = D              p (log p - log q - D)
    forward_kl      sum q (log q - log p)                   p - q
    jsd             b KL(q||m) + (1-b) KL(p||m),            (1-b) p (log p - log m - KL(p||m))
                    m = (1-b) p + b q
    sampled_kl      -A log p_y,  A = log q_y - log p_y      -A (1_y - p), A held constant
    cross_entropy   -log p_y                                p - 1_y

sampled_kl is the policy-gradient estimator (k1) on the sampled token y: over y ~ p its gradient averages to that of
reverse_kl exactly, at a higher variance. Differentiating log p_y - log q_y itself would average to zero: the teacher
drops out.

All of them treat the sampled tokens as given: how the student's earlier tokens change which later states it visits is
not differentiated. That is what on-policy distillation means in practice.
"""

import math

import torch
from torch import Tensor

LOSSES = ("reverse_kl", "forward_kl", "jsd", "sampled_kl", "cross_entropy")
CHUNK_BYTES = 256 * 2**20  # memory for the (chunk, V) buffers when chunk_rows is not given
FAR = -1e30  # the logit of a column that was merged into another: probability 0, and finite, so that 0 * FAR is 0


def distill_loss(
    hidden_s: Tensor,
    head_s: Tensor,
    hidden_t: Tensor | None = None,
    head_t: Tensor | None = None,
    *,
    loss: str = "reverse_kl",
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    targets: Tensor | None = None,
    stop_ids: tuple[int, ...] = (),
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of a divergence over N rows, differentiable in hidden_s and head_s, and statistics of every row.

    hidden_s (N, H), head_s (V, H): the student's hidden states and head. hidden_t (N, H_t), head_t (V_t, H_t): the
        teacher's, taken as constants; may be None for cross_entropy only.
    token_weights (N,): weight of each row, by default 1 / N. For a step split into parts, pass 1 / (rows of the whole
    step). temperature: divides both models' logits. beta: the jsd's mixture, 0 < beta < 1.
    targets (N,): the token that was sampled (or read); needed by sampled_kl and cross_entropy.
    stop_ids: ids that end a response and mean the same; merged into one outcome in both models (their probabilities
    add)
        before the divergence is taken, so that a student that stops with another id than the teacher is not punished
        for it.
    vocab: number of real tokens; rows of the heads beyond it are padding and ignored. Default: the smaller head's.
    chunk_rows: rows handled at once; default: as many as fit CHUNK_BYTES.

    Returns (loss, stats): a scalar, and detached (N,) tensors: "loss" (unweighted), "student_entropy", and where there
    is a teacher "kl" (reverse, in nats), "teacher_entropy", "agree" (same most likely token); with targets
    "student_logprob" and, with a teacher, "teacher_logprob".
    Raises ValueError on an unknown loss, missing targets or teacher, or ids beyond the vocabulary. Cannot be
    differentiated twice.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
    if targets is None and loss in ("sampled_kl", "cross_entropy"):
        raise ValueError(f"loss {loss!r} needs targets")
    if hidden_t is None and loss != "cross_entropy":
        raise ValueError(f"loss {loss!r} needs the teacher's hidden states and head")
    if loss == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, found {beta} (its ends are not the two KLs)")
    if vocab is None:
        vocab = min(head_s.shape[0], head_s.shape[0] if head_t is None else head_t.shape[0])
    if any(not 0 <= i < vocab for i in stop_ids):
        raise ValueError(f"stop_ids {stop_ids} must lie below the vocabulary of {vocab}")
    n = hidden_s.shape[0]
    if token_weights is None:
        token_weights = torch.full((n,), 1.0 / max(n, 1), device=hidden_s.device)
    if chunk_rows is None:
        buffers = 7 if hidden_t is not None else 4
        chunk_rows = max(1, CHUNK_BYTES // (buffers * vocab * 4))
    options = (loss, temperature, beta, tuple(sorted(set(stop_ids))), vocab, chunk_rows)
    total, names, *rows = FusedDivergence.apply(hidden_s, head_s, hidden_t, head_t, token_weights, targets, options)
    return total, dict(zip(names, rows))


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (c, H) times head^T -> (c, V), in float32 or wider.

    A half-precision product that is rounded to half precision and cast afterwards looks right in the loss, but the
    gradient is a difference of nearly equal distributions and comes out wrong by several percent. So the product itself
    must deliver float32: CUDA can accumulate into it, elsewhere the operands are cast up first.
    """
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ head.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return hidden.float() @ head.T.float()


def merge_stops(logits: Tensor, stop_ids: tuple[int, ...]) -> Tensor | None:
    """Add up the probabilities of `stop_ids` in place: the first gets the log-sum-exp, the others nothing.

    Returns each id's share (c, |stop_ids|) of the class, through which the gradient flows back.
    """
    if len(stop_ids) < 2:
        return None
    own = logits[:, stop_ids]
    logits[:, stop_ids] = FAR
    logits[:, stop_ids[0]] = own.logsumexp(-1)
    return own.softmax(-1)


class FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_s, head_s, hidden_t, head_t, weights, targets, options):
        loss, temperature, beta, stop_ids, vocab, chunk_rows = options
        W, U = head_s[:vocab].to(hidden_s.dtype), None if head_t is None else head_t[:vocab]
        wide = torch.promote_types(hidden_s.dtype, torch.float32)  # what logits and sums are held in
        grad_h, grad_W = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_s) if grad_h else None
        d_head = torch.zeros(head_s.shape, dtype=wide, device=head_s.device) if grad_W else None
        stats = {}  # name -> list of (c,) tensors
        total = torch.zeros((), dtype=wide, device=hidden_s.device)
        if len(stop_ids) > 1 and targets is not None:  # a sampled stop is the class, whose column is the first id's
            is_stop = torch.isin(targets, torch.tensor(stop_ids, device=targets.device))
            targets = targets.masked_fill(is_stop, stop_ids[0])

        for start in range(0, max(hidden_s.shape[0], 1), chunk_rows):  # N = 0 makes one empty chunk
            part = slice(start, start + chunk_rows)
            h, w = hidden_s[part], weights[part].to(wide)[:, None]  # (c, H), (c, 1)
            z = head_logits(h, W).div_(temperature)  # (c, V)
            share = merge_stops(z, stop_ids)
            log_p = z.log_softmax(-1)
            p = log_p.exp()
            y = None if targets is None else targets[part, None]  # (c, 1)
            row = {"student_entropy": -(p * log_p).sum(-1)}
            if y is not None:
                row["student_logprob"] = log_p.gather(-1, y)[:, 0]
            if U is not None:
                t = head_logits(hidden_t[part], U).to(wide).div_(temperature)
                merge_stops(t, stop_ids)
                log_q = t.log_softmax(-1)
                log_ratio = log_p - log_q
                row["kl"] = (p * log_ratio).sum(-1)
                row["teacher_entropy"] = -(log_q.exp() * log_q).sum(-1)
                row["agree"] = (z.argmax(-1) == t.argmax(-1)).to(wide)
                if y is not None:
                    row["teacher_logprob"] = log_q.gather(-1, y)[:, 0]

            # The row's loss and dz, its gradient with respect to the tempered logits: the table of the module's
            # docstring.
            if loss == "reverse_kl":
                row["loss"] = row["kl"]
                dz = p * (log_ratio - row["kl"][:, None])
            elif loss == "forward_kl":
                q = log_q.exp()
                row["loss"] = -(q * log_ratio).sum(-1)
                dz = p - q
            elif loss == "jsd":
                log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
                kl_pm = (p * (log_p - log_m)).sum(-1)
                kl_qm = (log_q.exp() * (log_q - log_m)).sum(-1)
                row["loss"] = beta * kl_qm + (1 - beta) * kl_pm
                dz = (1 - beta) * p * (log_p - log_m - kl_pm[:, None])
            elif loss == "sampled_kl":
                advantage = row["teacher_logprob"] - row["student_logprob"]
                row["loss"] = -advantage * row["student_logprob"]
                one_y = torch.zeros_like(p).scatter_(-1, y, 1.0)
                dz = -advantage[:, None] * (one_y - p)
            else:  # cross_entropy
                row["loss"] = -row["student_logprob"]
                dz = p.scatter_add(-1, y, torch.full_like(p[:, :1], -1.0))

            total += (row["loss"] * w[:, 0]).sum()
            for name, value in row.items():
                stats.setdefault(name, []).append(value)
            dz.mul_(w / temperature)
            if share is not None:
                dz[:, stop_ids] = dz[:, stop_ids[:1]] * share
            if grad_h:
                d_hidden[part] = dz.to(W.dtype) @ W
            if grad_W:
                d_head[:vocab] += head_logits(dz.to(h.dtype).T, h.T)  # dz^T h, delivered in float32
        ctx.d_hidden, ctx.d_head = d_hidden, None if d_head is None else d_head.to(head_s.dtype)
        rows = [torch.cat(values) for values in stats.values()]
        ctx.mark_non_differentiable(*rows)
        return total, tuple(stats), *rows

    @staticmethod
    def backward(ctx, grad_total, *_):
        if torch.is_grad_enabled():  # somebody asked for a graph of this gradient (create_graph=True)
            raise RuntimeError("distill_loss cannot be differentiated twice: its gradient is computed, not recorded")
        d_hidden = None if ctx.d_hidden is None else ctx.d_hidden * grad_total.to(ctx.d_hidden.dtype)
        d_head = None if ctx.d_head is None else ctx.d_head * grad_total.to(ctx.d_head.dtype)
        return d_hidden, d_head, None, None, None, None, None

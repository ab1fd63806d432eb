"""Divergences between a student and a teacher, from hidden states, without ever holding an (N, V) tensor.

One row is one supervised position. The student's hidden state h and head W give the logits z = W h / T, the teacher's
give t in the same way; p = softmax(z), q = softmax(t). On-policy distillation minimises the reverse Kullback-Leibler
divergence

    D = KL(p || q) = sum_v p_v (log p_v - log q_v)

Its gradient with respect to the logits has a closed form. With dp_v/dz_u = p_v (1[u = v] - p_u),

    dD/dz_u = sum_v (log p_v - log q_v + 1) p_v (1[u = v] - p_u) = p_u (log p_u - log q_u - D)

(the "+ 1" cancels, because p sums to one). So autograd has nothing to record: `forward` below walks over chunks of
rows, forms z and t, turns z into dz, and multiplies it straight back, dh = dz W and dW += dz^T h; `backward` only
scales. That is four products with a head per row, where recomputing the logits in `backward` takes six, and memory for
a chunk of logits, whatever N is.

    loss             value of a row (y: its target token)    gradient dz (times weight / T)
    reverse_kl       D = sum p (log p - log q)               p (s - D), s = log p - log q
    topk_reverse_kl  the same over the top-k tokens and one  p (s - D), s the log-ratio of the token's bucket
                     bucket that holds all the others
    jsd              b KL(q||m) + (1-b) KL(p||m),            (1-b) p (s - KL(p||m)), s = log p - log m
                     m = (1-b) p + b q
    forward_kl       sum q (log q - log p)                   p - q
    sampled_kl       -A log p_y,  A = log q_y - log p_y      A (p - 1_y), A held constant
    cross_entropy    -log p_y                                p - 1_y

One numerical idea carries all of them. A model that is nearly certain has one p close to 1, and its entries of s and dz
are small differences of large numbers. So both logits are taken relative to their value at the student's most likely
token: there s, up to a constant of the row that drops out of p (s - mean of s), is exactly 0.
Where the gradient is p - q or p - 1_y, its entries sum to zero, so that the one that would cancel is set to minus the
sum of the others (`balance`).

Estimates of D from one sampled token y ~ p, with r = log p_y - log q_y, are easily confused:
    k1 = r                as a reward (A = -r, as in sampled_kl): averages to the gradient of D exactly; noisy.
    k1 = r                differentiated directly: averages to zero; the teacher drops out.
    k2 = r^2 / 2          differentiated directly: averages to the gradient of D (its value is biased).
    k3 = e^-r - 1 + r     differentiated directly: averages to p - q, the gradient of the *forward* divergence.
A sum over the top-k alone is no divergence at all: it turns negative, and falls when the student moves mass out of the
top-k. The bucket for the rest mends that.

All of them take the sampled tokens as given: how the student's earlier tokens change which later states it visits is
not differentiated, as is usual in on-policy distillation.
"""

import torch
from torch import Tensor

LOSSES = ("reverse_kl", "topk_reverse_kl", "forward_kl", "jsd", "sampled_kl", "cross_entropy")
CHUNK_ROWS = 256  # rows handled at once: see `chunk_rows`
FAR = -1e30  # the logit of padding, or of a token merged into another: probability 0, finite, so that 0 * FAR is 0


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
    top_k: int = 64,
    targets: Tensor | None = None,
    stop_ids: tuple[int, ...] = (),
    vocab: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of a divergence over N rows, differentiable in hidden_s and head_s, and statistics of every row.

    hidden_s (N, H), head_s (V, H): the student's hidden states and head. hidden_t (N, H_t), head_t (V_t, H_t): the
        teacher's, taken as constants; may be None for cross_entropy only. Hidden states in float64, float32 or half
        precision (float16 has no room for small gradients). A head is cast to its hidden states' dtype; half precision
        goes to float32 on a CPU, and on a GPU is multiplied as it is, into float32.
    token_weights (N,): weight of each row, by default 1 / N. For a step split into parts, pass 1 / (rows of the whole
        step). temperature: divides both models' logits. beta: the jsd's mixture, 0 < beta < 1. top_k: how many of the
        teacher's most likely tokens topk_reverse_kl keeps.
    targets (N,): the token that was sampled (or read); needed by sampled_kl and cross_entropy.
    stop_ids: ids that end a response and mean the same; merged into one outcome in both models (their probabilities
        add) before the divergence is taken, so that a student that stops with another id than the teacher is not
        punished for it.
    vocab: number of real tokens; rows of the heads beyond it are padding and ignored. Default: the smaller head's.
    chunk_rows: rows handled at once. Live memory is two to three (chunk_rows, V) buffers in float32 on a CPU, on a GPU
        six (reverse_kl) to ten (jsd), beside inputs, heads cast to another dtype, gradients (dW is summed in float32)
        and statistics.

    Returns (loss, stats): a scalar, and detached (N,) tensors: "loss" (unweighted), "student_entropy", and where there
    is a teacher "kl" (reverse, in nats, whatever the loss), "teacher_entropy", "agree" (same most likely token); with
    targets "student_logprob" and, with a teacher, "teacher_logprob". All at `temperature`, stop_ids merged.
    Raises ValueError on an unknown loss, missing targets or teacher, ids or options out of range, or inputs of
    different N. backward works once, and its gradient cannot be differentiated (RuntimeError).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
    if targets is None and loss in ("sampled_kl", "cross_entropy"):
        raise ValueError(f"loss {loss!r} needs targets")
    if (hidden_t is None) != (head_t is None) or (hidden_t is None and loss != "cross_entropy"):
        raise ValueError(f"loss {loss!r} needs the teacher's hidden states and head both")
    if len(found := {len(x) for x in (hidden_s, hidden_t, targets, token_weights) if x is not None}) > 1:
        raise ValueError(f"hidden states, targets and token_weights must have one row each, found {sorted(found)} rows")
    if loss == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, found {beta} (its ends are not the two KLs)")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, found {top_k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    smaller = len(head_s) if head_t is None else min(len(head_s), len(head_t))
    vocab = smaller if vocab is None else vocab
    if not 0 < vocab <= smaller:
        raise ValueError(f"vocab must lie between 1 and {smaller}, the rows of the smaller head; found {vocab}")
    if any(not 0 <= i < vocab for i in stop_ids):
        raise ValueError(f"stop_ids {stop_ids} must lie below the vocabulary of {vocab}")
    if targets is not None and bool(((targets < 0) | (targets >= vocab)).any()):
        raise ValueError(f"targets must lie below the vocabulary of {vocab}, found {int(targets.min())} "
                         f"to {int(targets.max())}")
    if token_weights is None:
        token_weights = hidden_s.new_full((len(hidden_s),), 1 / max(len(hidden_s), 1), dtype=torch.float32)
    # Rows of half-precision numbers that do not begin at multiples of 16 bytes make a GPU's products many times slower,
    # so some of the padding takes part, with probability 0. (Qwen3 has 151,669 tokens, and 151,936 rows.)
    width = vocab if hidden_s.dtype.itemsize >= 4 else min((vocab + 63) // 64 * 64, smaller)
    stops = torch.tensor(sorted(set(stop_ids)), device=hidden_s.device)
    if len(stops) < 2:
        stops = None
    elif targets is not None:
        targets = torch.where(torch.isin(targets, stops), stops[0], targets)
    total, names, stats = FusedDivergence.apply(
        hidden_s, head_s, hidden_t, head_t, token_weights, targets, stops, vocab, width, temperature, chunk_rows,
        (loss, beta, min(top_k, vocab)),
    )
    return total, dict(zip(names, stats.unbind(1)))


class FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_s, head_s, hidden_t, head_t, weights, targets, stops, vocab, width, temperature, chunk_rows, options
    ):
        n, wide = len(hidden_s), torch.promote_types(hidden_s.dtype, torch.float32)
        want_hidden, want_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_s, dtype=wide) if want_hidden else None
        d_head = torch.zeros_like(head_s, dtype=wide) if want_head else None  # rows beyond vocab stay 0
        W = operand(head_s[:width], hidden_s)
        W_t = None if head_t is None else operand(head_t[:width], hidden_t)
        # On a CPU the elementwise work goes over few rows at a time, so that they stay in its cache.
        block_rows = 16 if hidden_s.device.type == "cpu" else chunk_rows

        scale, names, stats = (weights.to(wide) / temperature)[:, None], (), None
        with torch.autocast(hidden_s.device.type, enabled=False):  # precision is chosen here, product by product
            for start in range(0, max(n, 1), chunk_rows):  # n = 0 makes one empty chunk
                chunk = slice(start, start + chunk_rows)
                h, y = operand(hidden_s[chunk], hidden_s), None if targets is None else targets[chunk]
                z = logits(h, W, temperature, vocab)  # (c, V)
                t = None if W_t is None else logits(operand(hidden_t[chunk], hidden_t), W_t, temperature, vocab)
                if stops is not None:
                    own = merge_stops(z, stops)
                    if t is not None:
                        merge_stops(t, stops)
                for b in range(0, max(len(h), 1), block_rows):
                    block = slice(b, b + block_rows)
                    found = value_and_gradient(
                        z[block], None if t is None else t[block], None if y is None else y[block, None], *options
                    )
                    if stats is None:  # made once, since small tensors that stay would litter the memory
                        names, stats = tuple(found), torch.empty(n, len(found), dtype=wide, device=h.device)
                    stats[chunk][block] = torch.cat(list(found.values()), dim=1)
                dz = z.mul_(scale[chunk])  # z holds the gradient with respect to the logits now
                if stops is not None:  # the gradient of the merged outcome, shared out by each id's probability in it
                    dz.index_copy_(1, stops, dz[:, stops[:1]] * own.softmax(-1))
                dz = operand(dz, h)
                if want_hidden:
                    d_hidden[chunk] = matmul(dz, W)
                if want_head:
                    add_matmul(d_head[:width], dz.T, h)
                del z, t, dz  # before the next chunk's are made

        total = (stats[:, names.index("loss")] * weights.to(wide)).sum()
        # The gradients are kept on ctx, not by save_for_backward: they are results, and there is no second derivative.
        ctx.gradients = [None if g is None else g.to(x.dtype) for g, x in ((d_hidden, hidden_s), (d_head, head_s))]
        ctx.mark_non_differentiable(stats)
        return total, names, stats

    @staticmethod
    def backward(ctx, grad_total, *_):
        if torch.is_grad_enabled():  # somebody asked for a graph of this gradient (create_graph=True)
            raise RuntimeError("distill_loss cannot be differentiated twice: its gradient is computed, not recorded")
        gradients, ctx.gradients = ctx.gradients, None  # handed over, so that dW never exists twice
        if gradients is None:
            raise RuntimeError("backward was called a second time: distill_loss keeps its gradient for one call only")
        for g in gradients:
            for part in () if g is None else g.split(4096):  # so that dW never exists twice here either
                part.copy_(part.to(grad_total.dtype) * grad_total)  # the factor is not rounded to half precision
        return *gradients, *[None] * 10


def value_and_gradient(
    z: Tensor, t: Tensor | None, y: Tensor | None, loss: str, beta: float, top_k: int
) -> dict[str, Tensor]:
    """The loss of each row and its gradient with respect to the logits, for a few rows.

    z, t (b, V): logits, t None without a teacher. y (b, 1): targets or None. Returns the statistics of distill_loss by
    name, (b, 1) each. z is replaced by the gradient, t is overwritten.
    """
    z_max, top = z.max(-1, keepdim=True)  # (b, 1), the student's most likely token
    z -= z_max
    p = z.exp()  # at most 1
    Z_s = sum_wide(p)
    p, log_Z_s = p.div_(Z_s.to(p.dtype)), Z_s.log()  # log p = z - log_Z_s
    stats = {"student_entropy": log_Z_s - dot(p, z)}
    if y is not None:
        stats["student_logprob"] = z.gather(-1, y) - log_Z_s
    if t is not None:
        at_top = t.gather(-1, top)
        t -= at_top
        t_max, t_top = t.max(-1, keepdim=True)
        q = (t - t_max).exp_()
        Z_t = sum_wide(q)
        q, log_Z_t = q.div_(Z_t.to(q.dtype)), Z_t.log() + t_max  # log q = t - log_Z_t
        stats["teacher_entropy"] = log_Z_t - dot(q, t)
        stats["agree"] = t_top == top
        if y is not None:
            stats["teacher_logprob"] = t.gather(-1, y) - log_Z_t
        score = z - t  # (b, V), s less a constant of its row, log_Z_t - log_Z_s, which makes it 0 at `top`
        mean = dot(p, score)
        stats["kl"] = (mean + (log_Z_t - log_Z_s)).clamp_(min=0)  # below 0 by rounding only

    if loss == "reverse_kl":
        stats["loss"] = stats["kl"]
        torch.mul(p, score.sub_(mean.to(z.dtype)), out=z)
    elif loss == "topk_reverse_kl":
        kept = t.topk(top_k, dim=-1).indices  # (b, k)
        tail_s, tail_t = (x.double().scatter(-1, kept, FAR).logsumexp(-1, keepdim=True) for x in (z, t))
        tail_score = (tail_s - tail_t).to(score.dtype)  # of the bucket; up to the same constant as score
        score = tail_score.expand_as(score).scatter(-1, kept, score.gather(-1, kept))
        shift = score.gather(-1, top)
        mean = dot(p, score.sub_(shift))  # measured from `top` again
        stats["loss"] = (mean + shift + (log_Z_t - log_Z_s)).clamp_(min=0)
        torch.mul(p, score.sub_(mean.to(z.dtype)), out=z)
    elif loss == "jsd":
        d = (log_Z_s - log_Z_t).to(z.dtype) - score  # log q - log p
        # log p - log m = -log(1 - beta + beta e^d), without overflow where d is large and exact where it is small
        weight = (d > 0).to(d.dtype).mul_(1 - 2 * beta).add_(beta)  # 1 - beta or beta
        score = -(d.clamp(min=0) + torch.log1p(weight * torch.expm1(-d.abs())))
        stats["loss"] = (beta * dot(q, d + score) + (1 - beta) * dot(p, score)).clamp_(min=0)
        mean = dot(p, score.sub_(score.gather(-1, top)))
        torch.mul(p, score.sub_(mean.to(z.dtype)), out=z).mul_(1 - beta)
    elif loss == "forward_kl":
        d = (log_Z_s - log_Z_t).to(z.dtype) - score  # log q - log p
        stats["loss"] = dot(q, d).clamp_(min=0)
        torch.mul(torch.where(d > 0, q, -p), torch.expm1(-d.abs()), out=z)  # p - q, exact where they are close
        balance(z, top)
    elif loss in ("sampled_kl", "cross_entropy"):
        advantage = torch.ones_like(Z_s)
        if loss == "sampled_kl":
            advantage = stats["teacher_logprob"] - stats["student_logprob"]
        stats["loss"] = -advantage * stats["student_logprob"]
        balance(p, y)  # p - 1_y
        torch.mul(p, advantage.to(z.dtype), out=z)
    else:
        raise NotImplementedError(f"loss {loss!r} has no branch in value_and_gradient")
    return stats


def sum_wide(x: Tensor) -> Tensor:
    """(b, V) -> (b, 1), in float64, since the difference of two such sums may be tiny."""
    return x.sum(-1, keepdim=True, dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(b, V), (b, V) -> (b, 1), row by row, likewise."""
    return sum_wide(a * b)


def balance(dz: Tensor, ids: Tensor) -> None:
    """Set the entry ids (b, 1) of each row of dz (b, V) to minus the sum of the others."""
    dz.scatter_(-1, ids, 0.0)
    dz.scatter_(-1, ids, -dz.sum(-1, keepdim=True))


def merge_stops(logits: Tensor, stops: Tensor) -> Tensor:
    """Merge the ids `stops` (k,) of the logits (c, V) into one outcome, in place: the first id's logit becomes the
    log-sum-exp, the others' FAR. Returns the logits they had, (c, k)."""
    own = logits[:, stops]
    logits.index_fill_(1, stops, FAR)
    logits.index_copy_(1, stops[:1], own.logsumexp(-1, keepdim=True))
    return own


# A product of half-precision numbers that is rounded to half precision and cast up afterwards looks right in the loss,
# but the gradient is a difference of nearly equal distributions and comes out wrong by several percent. So every
# product is delivered in float32: CUDA can do that with half-precision operands, elsewhere they are cast up first.


def operand(x: Tensor, like: Tensor) -> Tensor:
    """x as a product with hidden states of the dtype of `like` wants it."""
    return x.to(torch.float32 if like.dtype.itemsize < 4 and not like.is_cuda else like.dtype)


def logits(hidden: Tensor, head: Tensor, temperature: float, vocab: int) -> Tensor:
    """(c, H), (V, H) -> (c, V), FAR beyond the first `vocab`."""
    z = matmul(hidden, head.T)
    z = z if temperature == 1 else z.div_(temperature)
    z[:, vocab:] = FAR
    return z


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dtype.itemsize >= 4 else torch.mm(a, b, out_dtype=torch.float32)


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, in place."""
    if a.dtype.itemsize >= 4:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)

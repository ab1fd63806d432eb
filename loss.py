"""Divergences between a student and a teacher, from hidden states, without ever holding an (N, V) tensor.

One row is one supervised position. The student's hidden state h and head W give logits z = W h / T, the teacher's give
t the same way; p = softmax(z), q = softmax(t). The loss of on-policy distillation is the reverse Kullback-Leibler
divergence

    D = KL(p || q) = sum_v p_v (log p_v - log q_v)

Its gradient with respect to the logits has a closed form. With dp_v/dz_u = p_v (1[u = v] - p_u),

    dD/dz_u = sum_v (log p_v - log q_v + 1) p_v (1[u = v] - p_u) = p_u (log p_u - log q_u - D)

(the "+ 1" cancels, because the p_v sum to one). So autograd has nothing to record: `forward` below walks over chunks of
rows, forms z and t, turns z into dz in place, and multiplies it straight back, dh = dz W and dW += dz^T h. `backward`
only scales. That is four products with a head per row (recomputing the logits in `backward` takes six), and the live
memory is two (V, c) buffers for a chunk of c rows, whatever N is.

    loss             value of a row                          gradient dz (times weight / T)
    reverse_kl       sum p (log p - log q) = D               p (log p - log q - D)
    topk_reverse_kl  D over the top-k tokens and one bucket  p (s - D), s the log-ratio of the token's bucket
                     that holds all the others
    forward_kl       sum q (log q - log p)                   p - q
    jsd              b KL(q||m) + (1-b) KL(p||m),            (1-b) p (log p - log m - KL(p||m))
                     m = (1-b) p + b q
    sampled_kl       -A log p_y,  A = log q_y - log p_y      A (p - 1_y), A held constant
    cross_entropy    -log p_y                                p - 1_y

Four of these gradients are p (s - mean of s under p) for some score s: a constant added to s drops out. So s may be
formed from unnormalised logits, and is measured from its value at the student's most likely token; where p is all but
certain, the difference is then small numbers minus small numbers, and exact, not two large ones cancelling.

Estimates from one sampled token y ~ p, with r = log p_y - log q_y, are easily confused:
    k1 = r                as a reward (A = -r, as in sampled_kl): averages to the gradient of D exactly; noisy.
    k1 = r                differentiated directly: averages to zero; the teacher drops out.
    k2 = r^2 / 2          differentiated directly: averages to the gradient of D (its value is biased).
    k3 = e^-r - 1 + r     differentiated directly: averages to p - q, the gradient of the *forward* divergence.
A sum over the top-k alone is no divergence at all: it turns negative, and falls when the student moves mass out of the
top-k. The bucket for the rest mends that.

All of them treat the sampled tokens as given: how the student's earlier tokens change which later states it visits is
not differentiated. That is what on-policy distillation means in practice.
"""

import math

import torch
from torch import Tensor

LOSSES = ("reverse_kl", "topk_reverse_kl", "forward_kl", "jsd", "sampled_kl", "cross_entropy")
MEMORY_BUDGET = 256 * 2**20  # bytes for the logits of a chunk and what is done to them
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
    top_k: int = 64,
    top_k_of: str = "teacher",
    targets: Tensor | None = None,
    stop_ids: tuple[int, ...] = (),
    vocab: int | None = None,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    chunk_rows: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of a divergence over N rows, differentiable in hidden_s, head_s and bias_s, and per-row statistics.

    hidden_s (N, H), head_s (V, H): the student's hidden states and head. hidden_t (N, H_t), head_t (V_t, H_t): the
        teacher's, taken as constants; may be None for cross_entropy only. float64, float32, or half precision, in which
        case products are still delivered in float32.
    token_weights (N,): weight of each row, by default 1 / N. For a step split into parts, pass 1 / (rows of the whole
        step). temperature: divides both models' logits. beta: the jsd's mixture, 0 < beta < 1. top_k, top_k_of:
        topk_reverse_kl looks at the top_k tokens of the "teacher" or the "student".
    targets (N,): the token that was sampled (or read); needed by sampled_kl and cross_entropy.
    stop_ids: ids that end a response and mean the same; merged into one outcome in both models (their probabilities
        add) before the divergence is taken, so that a student that stops with another id than the teacher is not
        punished for it.
    vocab: number of real tokens; rows of the heads beyond it are padding and ignored. Default: the smaller head's.
    bias_s (V,), bias_t (V_t,): added to the logits, for heads that have one.
    chunk_rows: rows handled at once; default: as many as memory_budget (bytes) holds. Beyond the budget there are only
        the inputs, the gradients (dW is summed in float32), and the returned (N,) statistics.

    Returns (loss, stats): a scalar, and detached (N,) tensors: "loss" (unweighted), "student_entropy", and where there
    is a teacher "kl" (reverse, in nats, whatever the loss), "teacher_entropy", "agree" (same most likely token); with
    targets "student_logprob" and, with a teacher, "teacher_logprob".
    Raises ValueError on an unknown loss, missing targets or teacher, or ids beyond the vocabulary. Cannot be
    differentiated twice.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
    if targets is None and loss in ("sampled_kl", "cross_entropy"):
        raise ValueError(f"loss {loss!r} needs targets")
    if (hidden_t is None or head_t is None) and (loss != "cross_entropy" or hidden_t is not head_t):
        raise ValueError(f"loss {loss!r} needs the teacher's hidden states and head")
    if loss == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, found {beta} (its ends are not the two KLs)")
    if top_k < 1 or top_k_of not in ("teacher", "student"):
        raise ValueError(f"top_k must be at least 1 and of 'teacher' or 'student', found {top_k} of {top_k_of!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    largest = min(head_s.shape[0], head_s.shape[0] if head_t is None else head_t.shape[0])
    vocab = largest if vocab is None else vocab
    if not 0 < vocab <= largest:
        raise ValueError(f"vocab must lie between 1 and {largest}, the rows of the smaller head; found {vocab}")
    if any(not 0 <= i < vocab for i in stop_ids):
        raise ValueError(f"stop_ids {stop_ids} must lie below the vocabulary of {vocab}")
    if targets is not None and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(f"targets must lie below the vocabulary of {vocab}, found {int(targets.min())} "
                         f"to {int(targets.max())}")  # fmt: skip
    n = hidden_s.shape[0]
    if token_weights is None:
        token_weights = torch.full((n,), 1.0 / max(n, 1), device=hidden_s.device)
    options = {
        "loss": loss, "temperature": temperature, "beta": beta, "top_k": min(top_k, vocab), "top_k_of": top_k_of,
        "stop_ids": sorted(set(stop_ids)), "vocab": vocab, "chunk_rows": chunk_rows, "memory_budget": memory_budget,
    }  # fmt: skip
    total, names, *rows = FusedDivergence.apply(
        hidden_s, head_s, bias_s, hidden_t, head_t, bias_t, token_weights, targets, options
    )
    return total, dict(zip(names, rows))


class FusedDivergence(torch.autograd.Function):
    """All logits are held vocabulary first, (V, c): on a CPU the four products run up to 1.4 times faster this way
    round than on (c, V), a slice of the vocabulary is one piece of memory, and sums over it are vectorised over rows.
    """

    @staticmethod
    def forward(ctx, hidden_s, head_s, bias_s, hidden_t, head_t, bias_t, weights, targets, options):
        loss, vocab, stop_ids, beta = (options[k] for k in ("loss", "vocab", "stop_ids", "beta"))
        n, device = hidden_s.shape[0], hidden_s.device
        wide = torch.promote_types(hidden_s.dtype, torch.float32)  # what logits and gradient sums are held in
        d_hidden, d_head, d_bias = (
            torch.zeros(x.shape, dtype=wide, device=device) if needed else None
            for x, needed in zip((hidden_s, head_s, bias_s), ctx.needs_input_grad)
        )
        total, rows = torch.zeros((), dtype=wide, device=device), {}  # rows: name -> list of (c,) tensors

        # Even chunks within the budget: each costs a pass over dW, and a short last one would cost as much as a long.
        tile_numel = 2**18 if device.type == "cpu" else 2**22  # elementwise work goes tile by tile, in the cache
        row_bytes = vocab * wide.itemsize * (1 if hidden_t is None else 2)
        most = max(1, (options["memory_budget"] - 8 * tile_numel * wide.itemsize) // row_bytes)
        chunk_rows = options["chunk_rows"] or math.ceil(n / max(1, math.ceil(n / most))) or 1
        buffers = torch.empty((1 if hidden_t is None else 2, vocab * min(chunk_rows, max(n, 1))), dtype=wide,
                              device=device)  # fmt: skip

        with torch.autocast(device.type, enabled=False):  # precision is chosen here, product by product
            for start in range(0, max(n, 1), chunk_rows):  # N = 0 makes one empty chunk
                part = slice(start, start + chunk_rows)
                h = hidden_s[part]
                c = h.shape[0]
                tile = max(1, tile_numel // max(c, 1))
                y = None if targets is None else merged_id(targets[part], stop_ids)  # (c,)
                z = buffers[0, : vocab * c].view(vocab, c)
                project(head_s, bias_s, h, options["temperature"], out=z)
                share = merge_stops(z, stop_ids)
                t = None
                if hidden_t is not None:
                    t = buffers[1, : vocab * c].view(vocab, c)
                    project(head_t, bias_t, hidden_t[part], options["temperature"], out=t)
                    merge_stops(t, stop_ids)

                if loss == "topk_reverse_kl":  # the statistics first, then the teacher is reshaped
                    full, *_ = describe(z, t, y, tile, keep="logits")
                    flatten_tail(z, t, options["top_k"], options["top_k_of"])
                keep = "score" if loss in ("reverse_kl", "topk_reverse_kl") else "probability"
                row, top, norm_p, norm_q, mean = describe(z, t, y, tile, keep)
                w = weights[part].to(wide) / options["temperature"]  # (c,)
                if loss in ("reverse_kl", "topk_reverse_kl"):
                    row = {**(row if loss == "reverse_kl" else full), "loss": row["kl"]}
                    for p, s in tiles(z, t, tile=tile):
                        p.mul_(s.sub_(mean).mul_(w * norm_p))
                elif loss == "forward_kl":
                    row["loss"] = row["forward_kl"]
                    for p, q in tiles(z, t, tile=tile):
                        p.mul_(w * norm_p).sub_(q.mul_(w * norm_q))
                    balance(z, top)
                elif loss == "jsd":
                    row["loss"], mean = jsd_score(z, t, top, norm_p, norm_q, beta, tile)
                    for p, s in tiles(z, t, tile=tile):
                        p.mul_(s.sub_(mean).mul_(w * (1 - beta)))
                else:
                    advantage = 1.0
                    if loss == "sampled_kl":
                        advantage = row["teacher_logprob"] - row["student_logprob"]
                    row["loss"] = -advantage * row["student_logprob"]
                    z.mul_(w * advantage * norm_p)
                    balance(z, y)
                row.pop("forward_kl", None)

                for name, value in row.items():
                    rows.setdefault(name, []).append(value)
                total += (row["loss"] * weights[part].to(wide)).sum()
                if share is not None:  # the class's gradient flows back through each id's share
                    z[stop_ids] = z[stop_ids[0]] * share
                if d_bias is not None:
                    d_bias[:vocab] += z.sum(1)
                back_project(z, head_s, h, None if d_hidden is None else d_hidden[part], d_head)
        # The gradients ride on ctx, not in save_for_backward: they are results, and there is no second derivative
        ctx.gradients = [
            None if g is None else g.to(x.dtype)
            for g, x in zip((d_hidden, d_head, d_bias), (hidden_s, head_s, bias_s))
        ]
        rows = {name: torch.cat(values) for name, values in rows.items()}
        ctx.mark_non_differentiable(*rows.values())
        return total, tuple(rows), *rows.values()

    @staticmethod
    def backward(ctx, grad_total, *_):
        if torch.is_grad_enabled():  # somebody asked for a graph of this gradient (create_graph=True)
            raise RuntimeError("distill_loss cannot be differentiated twice: its gradient is computed, not recorded")
        gradients, ctx.gradients = ctx.gradients, None  # handed over, so that dW never exists twice
        if gradients is None:
            raise RuntimeError("backward was called a second time: distill_loss keeps its gradient for one call only")
        for g in gradients:
            if g is not None:
                g.mul_(grad_total.to(g.dtype))
        return *gradients, None, None, None, None, None, None


def tiles(*buffers: Tensor, tile: int):
    """Slices of `tile` vocabulary entries, as views (tile, c) of each buffer: small enough to stay in the cache."""
    return zip(*(b.split(tile) for b in buffers))


def add_product(out: Tensor, a: Tensor, b: Tensor, keep: bool = True, scale: float = 1.0) -> None:
    """out (+)= scale a @ b, for out in float32 or wider.

    A half-precision product that is rounded to half precision and cast afterwards looks right in the loss, but the
    gradient is a difference of nearly equal distributions and comes out wrong by several percent. So the product itself
    must deliver float32: CUDA can accumulate into it, elsewhere the operands were cast up first.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=float(keep), alpha=scale)
    else:
        product = torch.mm(a, b, out_dtype=out.dtype).mul_(scale)
        out.add_(product) if keep else out.copy_(product)


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """What a product with `hidden` takes as operands: its own type, but float32 for half precision off CUDA."""
    return torch.float32 if hidden.dtype.itemsize < 4 and not hidden.is_cuda else hidden.dtype


def blocks(head: Tensor, vocab: int, dtype: torch.dtype):
    """(slice, block of the head in dtype): one block if it has that dtype already, else cast piece by piece."""
    size = vocab if head.dtype == dtype else max(1, 2**21 // head.shape[1])
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        yield slice(start, stop), head[start:stop].to(dtype)


def project(head: Tensor, bias: Tensor | None, hidden: Tensor, temperature: float, out: Tensor) -> None:
    """out (V, c) = (head (V, H) hidden^T (H, c) + bias) / temperature."""
    dtype = operand_dtype(hidden)
    x = hidden.to(dtype).T
    for part, block in blocks(head, out.shape[0], dtype):
        add_product(out[part], block, x, keep=False, scale=1 / temperature)
    if bias is not None:
        out += bias[: out.shape[0], None].to(out.dtype) / temperature


def back_project(dz: Tensor, head: Tensor, hidden: Tensor, d_hidden: Tensor | None, d_head: Tensor | None) -> None:
    """d_hidden (c, H) += dz^T head and d_head (V, H) += dz hidden, from dz (V, c)."""
    dtype = operand_dtype(hidden)
    x = hidden.to(dtype)
    for part, block in blocks(head, dz.shape[0], dtype):
        piece = dz[part].to(dtype)
        if d_hidden is not None:
            add_product(d_hidden, piece.T, block)
        if d_head is not None:
            add_product(d_head[part], piece, x)


def balance(dz: Tensor, ids: Tensor) -> None:
    """Set row ids (c,) of dz (V, c) to minus the sum of the others: the entries of a softmax's gradient sum to zero,
    and p - 1 or p - q lose their digits where p is nearly one."""
    column = torch.arange(dz.shape[1], device=dz.device)
    dz[ids, column] = 0
    dz[ids, column] = -dz.sum(0)


def merge_stops(logits: Tensor, stop_ids: list[int]) -> Tensor | None:
    """Add up the probabilities of `stop_ids` in place: the first row of (V, c) gets the log-sum-exp, the others nothing.

    Returns each id's share (|stop_ids|, c) of the class, through which the gradient flows back.
    """
    if len(stop_ids) < 2:
        return None
    own = logits[stop_ids]
    logits[stop_ids] = FAR
    logits[stop_ids[0]] = own.logsumexp(0)
    return own.softmax(0)


def merged_id(targets: Tensor, stop_ids: list[int]) -> Tensor:
    """A sampled stop is the class, whose row is the first id's."""
    if len(stop_ids) < 2:
        return targets
    return targets.masked_fill(torch.isin(targets, torch.tensor(stop_ids, device=targets.device)), stop_ids[0])


def argmax(x: Tensor, tile: int) -> Tensor:
    """x (V, c) -> (c,) int64: the tile with the largest maximum first, then the place in it (argmax is a slow pass)."""
    start = torch.stack([b.amax(0) for b in x.split(tile)]).argmax(0) * tile
    ids = (start + torch.arange(tile, device=x.device)[:, None]).clamp_(max=x.shape[0] - 1)  # (tile, c)
    return (start + x.gather(0, ids).argmax(0)).clamp_(max=x.shape[0] - 1)


def describe(z: Tensor, t: Tensor | None, y: Tensor | None, tile: int, keep: str):
    """Everything about a chunk that one pass over its logits gives.

    z, t (V, c) logits, y (c,) or None. `keep` says what the pass leaves in the buffers: "logits", as they were;
    "score": e = exp(z - its maximum) and s = z - t less its value at the student's most likely token; "probability":
    e and f = exp(t - its maximum).
    Returns (row, top, norm_p, norm_q, mean): the statistics of distill_loss, by name; the student's most likely token;
    the factors that make e and f probabilities; and the mean of s under p. All (c,); the last two None without teacher.
    """
    c, column = z.shape[1], torch.arange(z.shape[1], device=z.device)
    # Every tile's sums are added up in float64, so that nothing is lost when log Z - log Y, or D, is small
    Z, Y, sum_ex, sum_fu, sum_es, sum_fs = torch.zeros(6, c, dtype=torch.float64, device=z.device).unbind()
    top = argmax(z, tile)
    z_max, z_y = z[top, column], None if y is None else z[y, column]
    if t is not None:
        t_top = argmax(t, tile)
        t_max, t_y = t[t_top, column], None if y is None else t[y, column]
        t_at_top = t[top, column]
    for start in range(0, z.shape[0], tile):
        z_b = z[start : start + tile]
        x = z_b - z_max
        e = x.exp()
        Z += e.sum(0)
        sum_ex += x.mul_(e).sum(0)
        if t is not None:
            t_b = t[start : start + tile]
            u = t_b - t_max
            f = u.exp()
            Y += f.sum(0)
            sum_fu += u.mul_(f).sum(0)
            s = torch.sub(z_b, t_b, out=t_b if keep == "score" else x).sub_(z_max - t_at_top)
            sum_es += torch.mul(e, s, out=u).sum(0)
            if keep == "probability":
                sum_fs += torch.mul(f, s, out=u).sum(0)
                t_b.copy_(f)
        if keep != "logits":
            z_b.copy_(e)

    row = {"student_entropy": Z.log() - sum_ex / Z}
    norm_q = mean = None
    if y is not None:
        row["student_logprob"] = (z_y - z_max) - Z.log()
    if t is not None:
        shift = (t_max - t_at_top) + (Y / Z).log()  # log p - log q at the student's most likely token
        norm_q, mean = (1 / Y).to(z.dtype), (sum_es / Z).to(z.dtype)
        row["kl"] = sum_es / Z + shift
        row["teacher_entropy"] = Y.log() - sum_fu / Y
        row["agree"] = top == t_top
        if keep == "probability":
            row["forward_kl"] = -sum_fs / Y - shift
        if y is not None:
            row["teacher_logprob"] = (t_y - t_max) - Y.log()
    return {k: v.to(z.dtype) for k, v in row.items()}, top, (1 / Z).to(z.dtype), norm_q, mean


def flatten_tail(z: Tensor, t: Tensor, top_k: int, top_k_of: str) -> None:
    """Outside the top-k, give the teacher the student's shape and its own total: then KL over single tokens is KL over
    the top-k and one bucket. z, t (V, c); t is overwritten."""
    ids = (t if top_k_of == "teacher" else z).topk(top_k, dim=0).indices  # (k, c)
    kept = t.gather(0, ids)
    total_z, total_t = tail_logsumexp(z, ids), tail_logsumexp(t, ids)
    torch.add(z, total_t - total_z, out=t).scatter_(0, ids, kept)


def tail_logsumexp(x: Tensor, ids: Tensor) -> Tensor:
    """x (V, c), ids (k, c) -> (c,): log-sum-exp over the rows that are not in ids."""
    own = x.gather(0, ids)
    x.scatter_(0, ids, FAR)
    top = x.amax(0)
    total = sum((b - top).exp_().sum(0) for b in x.split(2**10)).log_().add_(top)
    x.scatter_(0, ids, own)
    return total


def jsd_score(e: Tensor, f: Tensor, top: Tensor, norm_p: Tensor, norm_q: Tensor, beta: float, tile: int):
    """Turn e, f (V, c) into p and log p - log m less its value at `top`. Returns (jsd, mean of that score), (c,)."""
    tiny, column = torch.finfo(e.dtype).tiny, torch.arange(e.shape[1], device=e.device)

    def log_ratio(a, m):  # log a - log m, where a = 0 finite: its weight is 0
        return (a.clamp_min(tiny) / m.clamp_min(tiny)).log()

    p_top, q_top = norm_p * e[top, column], norm_q * f[top, column]
    at_top = log_ratio(p_top, torch.lerp(p_top, q_top, beta))
    kl_qm, mean = torch.zeros(2, e.shape[1], dtype=torch.float64, device=e.device).unbind()
    for p, f_b in tiles(e, f, tile=tile):
        p.mul_(norm_p)
        q = f_b * norm_q
        m = torch.lerp(p, q, beta)
        torch.sub(log_ratio(p, m), at_top, out=f_b)
        kl_qm += (q * log_ratio(q, m)).sum(0)
        mean += (p * f_b).sum(0)
    return (beta * kl_qm + (1 - beta) * (mean + at_top)).to(e.dtype), mean.to(e.dtype)

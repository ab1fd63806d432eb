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
    reverse_kl       sum p (log p - log q) = D               p (s - D), s = log p - log q
    topk_reverse_kl  D over the top-k tokens and one bucket  p (s - D), s the log-ratio of the token's bucket
                     that holds all the others
    jsd              b KL(q||m) + (1-b) KL(p||m),            (1-b) p (s - KL(p||m)), s = log p - log m
                     m = (1-b) p + b q
    forward_kl       sum q (log q - log p)                   p - q
    sampled_kl       -A log p_y,  A = log q_y - log p_y      A (p - 1_y), A held constant
    cross_entropy    -log p_y                                p - 1_y

The first three are p (s - mean of s under p): a constant added to s drops out. So s may be formed from unnormalised
logits, and is measured from its value at the student's most likely token; where p is all but certain, the difference is
then of small numbers, and exact, not of two large ones that cancel. The others are differences whose entries sum to
zero, so the entry that would cancel is set to minus the sum of the rest (`balance`).

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
from pathlib import Path

import torch
from torch import Tensor

LOSSES = ("reverse_kl", "topk_reverse_kl", "forward_kl", "jsd", "sampled_kl", "cross_entropy")
LEAVES = {"reverse_kl": "score", "topk_reverse_kl": "score", "jsd": "logits", "forward_kl": "logits",
          "sampled_kl": "probability", "cross_entropy": "probability"}  # what describe() leaves of a chunk's logits
# torch multiplies by Intel's library. On AMD's processors (told by Linux only) oneDNN forms logits in 0.6 to 1.0 of its
# time, and dW a little sooner, but it cannot add to what is there. It has no public name in torch, and the one used
# here is what torch.compile writes. (model.py asks the same of the processor; this file is to need nothing but torch.)
CPUINFO = Path("/proc/cpuinfo")
AMD = CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text(errors="replace")
AMD = AMD and torch.backends.mkldnn.is_available()
LOG2_E = math.log2(math.e)
ROOM = 40  # tiles that are set aside from the budget for elementwise work; see `sizes`
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
    memory_budget: int | None = None,
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
    chunk_rows: rows handled at once; default: as many as memory_budget (bytes; default: see `sizes`) holds. Beyond the
        budget there are only the inputs, the gradients (dW is summed in float32), and the returned (N,) statistics.

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
    if (hidden_t is None) != (head_t is None) or (hidden_t is None and loss != "cross_entropy"):
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
            torch.empty(x.shape, dtype=wide, device=device) if needed else None
            for x, needed in zip((hidden_s, head_s, bias_s), ctx.needs_input_grad)
        )
        for gradient in (d_head, d_bias):  # padding
            if gradient is not None:
                gradient[vocab:] = 0
        total, rows = torch.zeros((), dtype=wide, device=device), {}  # rows: name -> list of (c,) tensors

        budget, tile_numel = sizes(device.type)
        parts = parts_of(device)  # a tile is to be divisible by them
        models = 1 if hidden_t is None else 2
        budget = (options["memory_budget"] or budget) - ROOM * tile_numel * wide.itemsize
        chunk_rows = options["chunk_rows"] or even_chunks(n, budget // (models * vocab * wide.itemsize))

        buffers = [
            None if by_onednn(x, head) else torch.empty(vocab * min(chunk_rows, n), dtype=wide, device=device)
            for x, head in ((hidden_s, head_s), (hidden_t, head_t))[:models]
        ]
        with torch.autocast(device.type, enabled=False):  # precision is chosen here, product by product
            for start in range(0, max(n, 1), chunk_rows):  # N = 0 makes one empty chunk
                part = slice(start, start + chunk_rows)
                h = hidden_s[part]
                c = h.shape[0]
                tile = parts * max(1, tile_numel // max(c * parts, 1))
                y = None if targets is None else merged_id(targets[part], stop_ids)  # (c,)
                z = t = None  # the last chunk's make room for this one's
                z = project(head_s, bias_s, h, options["temperature"], vocab, buffers[0])  # (V, c)
                share = merge_stops(z, stop_ids)
                if hidden_t is not None:
                    t = project(head_t, bias_t, hidden_t[part], options["temperature"], vocab, buffers[1])
                    merge_stops(t, stop_ids)

                if loss == "topk_reverse_kl":
                    ids, tail_ratio = split_tail(z, t, options["top_k"], options["top_k_of"], tile)
                row, top, norm_p, norm_q, mean, shift, origin = describe(z, t, y, tile, leave=LEAVES[loss])
                scale = norm_p  # (c,): z times it will be the gradient with respect to the logits
                if loss in ("sampled_kl", "cross_entropy"):
                    advantage = row["teacher_logprob"] - row["student_logprob"] if loss == "sampled_kl" else 1
                    row["loss"] = -advantage * row["student_logprob"]
                    balance(z, y)
                    scale = norm_p * advantage
                elif loss == "forward_kl":
                    row["loss"] = forward_gradient(z, t, top, norm_p, norm_q, origin - shift, tile)
                    scale = torch.ones_like(norm_p)
                elif loss == "jsd":
                    row["loss"], mean = jsd_score(z, t, top, norm_p, norm_q, origin - shift, beta, tile)
                    weigh(z, t, mean.to(wide), tile)
                    scale = norm_p * (1 - beta)
                else:
                    if loss == "topk_reverse_kl":
                        mean, shift = bucket_score(z, t, top, norm_p, shift, ids, tail_ratio - origin, tile)
                    row["loss"] = score_gradient(z, t, norm_p, mean, shift, tile)
                    if loss == "reverse_kl":
                        row["kl"] = row["loss"]

                for name, value in row.items():
                    rows.setdefault(name, []).append(value.to(wide))
                w = weights[part].to(wide)
                total += (rows["loss"][-1] * w).sum()
                scale = scale.to(wide) * w / options["temperature"]
                if share is not None:  # the class's gradient flows back through each id's share
                    z[stop_ids] = z[stop_ids[0]] * share
                if d_bias is not None:
                    d_bias[:vocab] = z @ scale + (d_bias[:vocab] if start else 0)
                d_head = back_project(
                    z, scale, head_s, h, None if d_hidden is None else d_hidden[part], d_head, start == 0
                )
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


def sizes(device_type: str) -> tuple[int, int]:
    """(bytes for the logits of a chunk and what is done to them; logits that elementwise work takes at a time).

    On a CPU a tile is to stay in the cache. A GPU wants fewer and larger pieces: each costs a launch, and each chunk
    a pass over the head and over dW. The budget holds for what a process takes, which is up to 25 MiB more than what is
    alive: a C library keeps some of what is freed. ROOM includes that.
    """
    return (2**28, 2**18) if device_type == "cpu" else (2**30, 2**21)


def even_chunks(n: int, most: int) -> int:
    """Rows of a chunk, so that n rows go in few chunks of about equal size: each costs a pass over dW, and a short last
    one costs as much as a long one. Multiples of 64, where that is fine enough: on a CPU, 176 rows took 1.03 to 1.05
    times as long a row as 128, and 214 up to 1.6 times as long as 256."""
    unit = 64 if most >= 128 else 16
    most = max(1, most // unit * unit or most)
    rows = math.ceil(max(n, 1) / math.ceil(max(n, 1) / most))
    return min(most, math.ceil(rows / unit) * unit)


def tiles(*buffers: Tensor, tile: int):
    """Slices of `tile` vocabulary entries, as views (tile, c) of each buffer: small enough to stay in the cache."""
    return zip(*(b.split(tile) for b in buffers))


def parts_of(device: torch.device) -> int:
    """In how many parts `add_up` sums: one for each thread of a CPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def add_up(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x (tile, c) -> (parts, c): sums over runs of rows, one for each thread (over all rows if they do not divide).

    A plain sum(0) of numbers that another call has just written took 2 to 3 times as long on two cores, and 7 to 12
    times in a slow state of the machine; likely because each thread then reads what the other wrote. Of numbers that
    have lain there it is the quicker way (0.6 of the time).
    """
    parts = parts_of(x.device)
    parts = parts if len(x) % parts == 0 else 1
    return torch.sum(x.view(parts, len(x) // parts, x.shape[1]), 1, out=None if out is None else out[:parts])


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
    """(slice, block of the head in dtype): piece by piece where it has to be cast, or where its product will have to be
    (half precision delivers float32 into a tensor of its own); else one block."""
    whole = head.dtype == dtype and dtype.itemsize >= 4
    size = vocab if whole else max(1, 16 * sizes(head.device.type)[1] // head.shape[1])
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        yield slice(start, stop), head[start:stop].to(dtype)


def by_onednn(hidden: Tensor, head: Tensor) -> bool:
    """Whether `project` forms these logits by oneDNN, which hands out memory of its own."""
    return AMD and len(hidden) > 0 and hidden.device.type == "cpu" and hidden.dtype == head.dtype == torch.float32


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, in memory of its own."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")


def project(
    head: Tensor, bias: Tensor | None, hidden: Tensor, temperature: float, vocab: int, buffer: Tensor | None
) -> Tensor:
    """(head (V, H) hidden^T (H, c) + bias) / temperature -> (V, c), float32 or wider, in the buffer if there is one."""
    dtype, c = operand_dtype(hidden), len(hidden)
    if buffer is None:
        z = onednn(head[:vocab], hidden / temperature)
    else:
        z, x = buffer[: vocab * c].view(vocab, c), hidden.to(dtype).T
        for part, block in blocks(head, vocab, dtype):
            add_product(z[part], block, x, keep=False, scale=1 / temperature)
    return z if bias is None else z.add_(bias[:vocab, None].to(z.dtype) / temperature)


def back_project(
    dz: Tensor, scale: Tensor, head: Tensor, h: Tensor, d_hidden: Tensor | None, d_head: Tensor | None, first: bool
) -> Tensor | None:
    """d_hidden (c, H) = g^T head and d_head (V, H) += g h, or = for the first chunk, with g = dz (V, c) scale (c,).

    Scaling h and d_hidden instead of dz is the same, and saves a pass over dz. Returns d_head, which may be another
    tensor after the first chunk.
    """
    dtype, scale = operand_dtype(h), scale[:, None]
    x = (h * scale).to(dtype)
    anew = first and d_head is not None and by_onednn(h, head) and len(dz) == len(head)
    if anew:
        d_head = onednn(dz, x.T)
    if d_hidden is not None:
        d_hidden.zero_()
    for part, block in blocks(head, dz.shape[0], dtype):
        piece = dz[part].to(dtype)
        if d_hidden is not None:
            if h.is_cuda:
                add_product(d_hidden, piece.T, block)
            else:
                d_hidden += contract(piece, block)
        if d_head is not None and not anew:
            add_product(d_head[part], piece, x, keep=not first)
    if d_hidden is not None:
        d_hidden.mul_(scale)
    return d_head


def contract(dz: Tensor, head: Tensor) -> Tensor:
    """dz (V, c), head (V, H) -> dz^T head (c, H), on a CPU: as two products of half the vocabulary each, which torch
    hands to the threads whole. One, with so long a sum for so small a result, took up to 1.15 times as long."""
    half, odd = divmod(len(dz), 2)
    a, b = (x[: 2 * half].unflatten(0, (2, half)) for x in (dz, head))
    product = torch.bmm(a.transpose(1, 2), b).sum(0)
    return product.addmm_(dz[-1:].T, head[-1:]) if odd else product


def balance(dz: Tensor, ids: Tensor) -> None:
    """Set the entry ids (c,) of dz (V, c) to minus the sum of the others."""
    column = torch.arange(dz.shape[1], device=dz.device)
    dz[ids, column] = 0
    dz[ids, column] = -dz.sum(0)


def merge_stops(logits: Tensor, stop_ids: list[int]) -> Tensor | None:
    """Add up the probabilities of `stop_ids` in place: the first's row of (V, c) gets the log-sum-exp, the rest FAR.

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


def argmax(x: Tensor, block: int = 256) -> Tensor:
    """x (V, c) -> (c,) int64: the block with the largest maximum first, then the place in it: a plain one is slow."""
    even = len(x) // block * block
    largest = x[:even].unflatten(0, (even // block, block)).amax(1)  # (V / block, c)
    if even < len(x):
        largest = torch.cat((largest, x[even:].amax(0, keepdim=True)))
    start = largest.argmax(0) * block
    ids = (start + torch.arange(block, device=x.device)[:, None]).clamp_(max=x.shape[0] - 1)  # (block, c)
    return (start + x.gather(0, ids).argmax(0)).clamp_(max=x.shape[0] - 1)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """e^x. Intel's library takes 2.6 times as long for it on an AMD processor as torch's own code for 2^x does.
    The product's rounding costs a relative 1e-7 |x|, which is least where e^x counts: x is at most 0 here."""
    if AMD and x.device.type == "cpu":
        return torch.exp2(torch.mul(x, LOG2_E, out=out), out=out)
    return torch.exp(x, out=out)


def describe(z: Tensor, t: Tensor | None, y: Tensor | None, tile: int, leave: str):
    """Everything about a chunk that one pass over its logits gives, with one exponential per logit.

    z, t (V, c) logits, y (c,) or None. `leave` says what is left in z and t:
        "score": e = exp(z - its maximum), and s = z - t less its value at the student's most likely token;
        "probability": e, and t as it was; "logits": both as they were.
    Returns (row, top, norm_p, norm_q, mean, shift, origin), all (c,) and float64 but for the ids: the statistics of
    distill_loss, by name; the student's most likely token; what makes e and exp(t - its maximum) probabilities; the
    mean of s under p; log p - log q at `top`, and z - t there: log p - log q = s + shift = z - t - origin + shift.
    """
    column = torch.arange(z.shape[1], device=z.device)
    top = argmax(z)
    z_max, z_y = z[top, column], None if y is None else z[y, column].double()
    if t is not None:
        t_top = argmax(t)
        t_max, t_y = t[t_top, column], None if y is None else t[y, column].double()
        t_at_top = t[top, column]
        origin = z_max - t_at_top
    scratch = z.new_empty(5, tile, z.shape[1])  # made once: fresh memory costs more than the arithmetic on it
    # of each part of a tile; in the end, of all
    sums = z.new_zeros(6, math.ceil(z.shape[0] / tile), parts_of(z.device), z.shape[1])
    for i, start in enumerate(range(0, z.shape[0], tile)):
        z_b, t_b = z[start : start + tile], None if t is None else t[start : start + tile]
        x, u, f, e, s = scratch[:, : z_b.shape[0]]
        e, s = z_b if leave != "logits" else e, t_b if leave == "score" else s
        torch.sub(z_b, z_max, out=x)
        if t is not None:
            torch.sub(t_b, t_max, out=u)
            torch.sub(z_b, t_b, out=s).sub_(origin)
        add_up(exp(x, out=e), out=sums[0, i])
        add_up(x.mul_(e), out=sums[1, i])
        if t is not None:
            add_up(exp(u, out=f), out=sums[2, i])
            add_up(u.mul_(f), out=sums[3, i])
            add_up(f.sub_(e), out=sums[4, i])
            add_up(torch.mul(e, s, out=u), out=sums[5, i])
    Z, sum_ex, Y, sum_fu, Y_less_Z, sum_es = sums.sum((1, 2), dtype=torch.float64)

    row = {"student_entropy": Z.log() - sum_ex / Z}
    if y is not None:
        row["student_logprob"] = (z_y - z_max) - Z.log()
    if t is None:
        return row, top, 1 / Z, None, None, None, None
    relative = Y_less_Z / Z  # keeps its digits where the models are close; Y / Z has them where they are not
    shift = (t_max - t_at_top) + torch.where(relative.abs() < 0.5, relative.log1p(), (Y / Z).log())
    row["kl"] = sum_es / Z + shift
    row["teacher_entropy"] = Y.log() - sum_fu / Y
    row["agree"] = top == t_top
    if y is not None:
        row["teacher_logprob"] = row["student_logprob"] - (z_y - t_y - origin + shift)
    return row, top, 1 / Z, 1 / Y, sum_es / Z, shift, origin


def split_tail(z: Tensor, t: Tensor, top_k: int, top_k_of: str, tile: int) -> tuple[Tensor, Tensor]:
    """z, t (V, c) logits -> the top-k's ids (k, c), and the student's tail over the teacher's, before normalisation, as
    a logarithm (c,)."""
    ids = (t if top_k_of == "teacher" else z).topk(top_k, dim=0).indices
    tails = []
    for x in (z, t):
        kept = x.gather(0, ids)
        x.scatter_(0, ids, FAR)
        x_max = x.amax(0)
        tails.append(sum((b - x_max).exp_().double().sum(0) for b in x.split(tile)).log() + x_max)
        x.scatter_(0, ids, kept)
    return ids, tails[0] - tails[1]


def score_gradient(e, s, norm_p, mean, shift, tile) -> Tensor:
    """Turn e = p / norm_p and the score s (V, c) into e (s - mean), the gradient but for norm_p; s is overwritten.
    Returns the divergence (c,), where s + shift is log p - log q.

    The divergence is mean + shift, but that is right to 1e-8 nats only. With d = log p - log q it is also the sum of
    p (exp(-d) - 1 + d), since p and q both sum to one: no term is negative, and none cancel where the models are close.
    Where p vanishes and q does not, p exp(-d) has lost the latter (or is no number); then mean + shift is right.
    """
    coarse, mean, minus_shift = mean + shift, mean.to(s.dtype), -shift.to(s.dtype)
    sums, scratch, close = [], s.new_empty(2, tile, s.shape[1]), bool((coarse < 1e-2).any())
    for e_b, s_b in tiles(e, s, tile=tile):
        if close:
            x, y = scratch[:, : len(s_b)]
            torch.expm1(torch.sub(minus_shift, s_b, out=x), out=y)  # x is -d
            sums.append(add_up(y.sub_(x).mul_(e_b)))
        e_b.mul_(s_b.sub_(mean))
    if not close:
        return coarse
    fine = norm_p * torch.cat(sums).sum(0, dtype=torch.float64)
    return torch.where((fine - coarse).abs() < 1e-7, fine, coarse)


def weigh(e, s, mean, tile) -> None:
    """Turn e (V, c) into e (s - mean); s is overwritten."""
    for e_b, s_b in tiles(e, s, tile=tile):
        e_b.mul_(s_b.sub_(mean))


def bucket_score(e, s, top, norm_p, shift, ids, tail_score, tile) -> tuple[Tensor, Tensor]:
    """Give all tokens outside ids (k, c) their bucket's score (c,), in s (V, c), and measure it from `top` again.
    Returns (mean of the new score under p, its shift), (c,)."""
    kept = s.gather(0, ids)
    s.copy_(tail_score).scatter_(0, ids, kept)
    at_top = s[top, torch.arange(s.shape[1], device=s.device)]
    mean = torch.zeros_like(norm_p)
    for e_b, s_b in tiles(e, s, tile=tile):
        mean += add_up(e_b * s_b.sub_(at_top)).sum(0)
    return mean * norm_p, at_top + shift


def probabilities(z, t, top, norm_p, norm_q, offset, tile):
    """Tile by tile, (views of z and t, p, q, d = log q - log p), where t - z + offset is d. The logits may be
    overwritten. p - q and log p - log m are formed from d, or nothing would be left of them when p is close to q."""
    z_max, t_max = z[top, torch.arange(z.shape[1], device=z.device)], t.amax(0)
    norm_p, norm_q, offset = norm_p.to(z.dtype), norm_q.to(z.dtype), offset.to(z.dtype)
    for z_b, t_b in tiles(z, t, tile=tile):
        yield z_b, t_b, (z_b - z_max).exp_().mul_(norm_p), (t_b - t_max).exp_().mul_(norm_q), (t_b - z_b).add_(offset)


def forward_gradient(z, t, top, norm_p, norm_q, offset, tile) -> Tensor:
    """Turn logits z (V, c) into p - q. Returns KL(q || p), (c,)."""
    kl = torch.zeros_like(norm_p)
    for z_b, _, p, q, d in probabilities(z, t, top, norm_p, norm_q, offset, tile):
        torch.mul(torch.where(d > 0, q, -p), torch.expm1(-d.abs()), out=z_b)
        kl += add_up(q.mul_(d).add_(z_b)).sum(0)  # the p - q add up to nothing; see score_gradient
    balance(z, top)
    return kl


def jsd_score(z, t, top, norm_p, norm_q, offset, beta, tile) -> tuple[Tensor, Tensor]:
    """Turn logits z, t (V, c) into e = p / norm_p and the score log p - log m less its value at `top`.
    Returns (jsd, mean of the score), (c,). Both KLs of the jsd are added up token by token, where they cancel."""

    def log_p_over_m(d):  # -log(1 - beta + beta e^d), for d of either sign without overflow or cancellation
        other = torch.where(d > 0, d.new_tensor(1 - beta), d.new_tensor(beta))
        return other.mul_(torch.expm1(-d.abs())).log1p_().add_(d.clamp(min=0)).neg_()

    column, norm = torch.arange(z.shape[1], device=z.device), norm_p.to(z.dtype)
    at_top = log_p_over_m((t[top, column] - z[top, column]).add_(offset.to(z.dtype)))
    jsd, mean = torch.zeros_like(norm_p), torch.zeros_like(norm_p)
    for z_b, t_b, p, q, d in probabilities(z, t, top, norm_p, norm_q, offset, tile):
        score = log_p_over_m(d)
        jsd += add_up(q.mul_(d.add_(score)).mul_(beta).add_(p * score, alpha=1 - beta)).sum(0)
        torch.sub(score, at_top, out=t_b)
        mean += add_up(p * t_b).sum(0)
        torch.div(p, norm, out=z_b)
    return jsd, mean

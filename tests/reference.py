"""Slow, obvious versions of what the product does fast. Tests compare against these."""

import math

import torch
from torch import Tensor

from model import Transformer


def live(config, seed: int) -> Transformer:
    """A random model in which everything matters. `initialize` starts what a block adds to the stream at zero, so that
    a test on a fresh model would pass with any attention and any cache."""
    model = Transformer(config).initialize(seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                p.normal_(0.0, p.shape[-1] ** -0.5, generator=g)
            elif p.dim() == 1:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=g))
    return model


def dense_loss(
    hidden_s,
    head_s,
    hidden_t,
    head_t,
    *,
    loss,
    token_weights,
    temperature=1.0,
    beta=0.5,
    top_k=64,
    targets=None,
    stop_ids=(),
    vocab=None,
) -> Tensor:
    """distill_loss written from the definitions, all logits at once, differentiated by autograd."""
    vocab = vocab or min(head_s.shape[0], head_t.shape[0])
    z = (hidden_s @ head_s.T)[:, :vocab] / temperature
    t = (hidden_t @ head_t.T)[:, :vocab] / temperature
    if len(stop_ids) > 1:  # a new vocabulary: everything else, then the class
        rest = [i for i in range(vocab) if i not in stop_ids]
        z, t = (torch.cat([x[:, rest], x[:, list(stop_ids)].logsumexp(-1, keepdim=True)], -1) for x in (z, t))
        if targets is not None:
            targets = torch.tensor([len(rest) if int(y) in stop_ids else rest.index(int(y)) for y in targets])
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if loss == "reverse_kl":
        rows = (p * (log_p - log_q)).sum(-1)
    elif loss == "topk_reverse_kl":
        k = min(top_k, z.shape[1])
        kept = torch.zeros_like(z, dtype=torch.bool).scatter_(1, t.topk(k).indices, 1)
        rows = (p * (log_p - log_q)).where(kept, 0).sum(-1)
        if k < z.shape[1]:  # the bucket
            log_P, log_Q = (x.masked_fill(kept, -torch.inf).logsumexp(-1) for x in (log_p, log_q))
            rows = rows + log_P.exp() * (log_P - log_Q)
    elif loss == "forward_kl":
        rows = (q * (log_q - log_p)).sum(-1)
    elif loss == "jsd":
        log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        rows = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)
    elif loss not in ("sampled_kl", "cross_entropy"):
        raise ValueError(f"no dense form of --loss {loss} to compare with: add it above")
    else:
        log_p_y, log_q_y = (x.gather(-1, targets[:, None])[:, 0] for x in (log_p, log_q))
        rows = -(log_q_y - log_p_y).detach() * log_p_y if loss == "sampled_kl" else -log_p_y
    return (rows * token_weights).sum()


@torch.no_grad()
def full_recompute(model, prompt: list[int], max_new_tokens: int, stop_ids, choose) -> list[int]:
    """Sample one response by running the whole sequence again for every token. choose(logits (V,), step) -> id."""
    response: list[int] = []
    while len(response) < max_new_tokens:
        hidden = model(torch.tensor([prompt + response]))
        response.append(choose(hidden[0, -1] @ model.head.T, len(response)))
        if response[-1] in stop_ids:
            break
    return response

"""How long the prefix is, and which tokens of a response count: the schedules, the windows, the soft weights.

A constant prefix is the method of arXiv 2602.15260, growing ones are its follow-ups'. The windows are control
experiments that ask whether it is the first tokens that matter. `config` is train.py's Config.
"""

import math

import torch
from torch import Tensor

from sample import Rollout


def planned_prefix(step: int, config, adapted: int = 0) -> int:
    """The prefix length of a step (counted from 0); `adapted` is what the adaptive schedule has grown to."""
    if config.full_every and (step + 1) % config.full_every == 0:
        return config.max_new_tokens
    if config.schedule in ("constant", "adaptive"):
        return adapted if config.schedule == "adaptive" else config.prefix_len
    progress = min(1.0, step / max(1, (config.schedule_steps or config.steps) - 1))
    grown = round(progress * (config.prefix_len - config.prefix_start))
    if config.schedule == "staircase" and progress < 1:
        grown = grown // config.stair * config.stair
    return config.prefix_start + grown


def longest_response(config) -> int:
    """Tokens of the longest response that a run may sample."""
    if config.window != "prefix":
        return config.max_new_tokens
    return max(config.prefix_len, config.max_new_tokens if config.full_every or config.mix else 0)


def adapted_prefix(state: dict, kl: Tensor, position: Tensor, reached: float, config) -> dict:
    """The adaptive schedule: what a step's KL (n,) at its response positions (n,) makes of its state.

    The KL of the prefix's last half is smoothed over steps. What can be learnt there has been when it is down to a
    tenth of what it was in the run's first step, or has not fallen by 5% below its lowest for three steps. Then the
    prefix grows by half; but only if a quarter of the rollouts reached its end, for otherwise a longer one would
    hold little more. After adaptive FastOPD (arXiv 2607.29494), whose four signals this reduces to two.
    """
    length, edge = state["prefix_len"], kl[(position >= state["prefix_len"] // 2) & (position < state["prefix_len"])]
    if not len(edge):
        return state
    now = edge.double().mean().item()
    if state["smooth"] is None:
        state = {"prefix_len": length, "smooth": now, "first": state.get("first", now), "lowest": now, "waited": -1}
    smooth = 0.7 * state["smooth"] + 0.3 * now
    fell = smooth < 0.95 * state["lowest"]
    waited, lowest = (0, smooth) if fell else (state["waited"] + 1, state["lowest"])
    if (waited >= 3 or now < 0.1 * state["first"]) and reached >= 0.25 and length < config.prefix_len:
        return {**state, "prefix_len": min(config.prefix_len, math.ceil(1.5 * length)), "smooth": None}
    return {**state, "smooth": smooth, "lowest": lowest, "waited": waited}


def drift_warning(kl: float, first_kl: float, finish: float, config) -> str:
    """What to say of a step whose prefix has been learnt while most responses go on beyond it (LOG.md: on the embedded
    pair greedy accuracy fell from 0.97 to 0.57 from there on); empty when there is nothing to say."""
    if config.schedule != "constant" or config.window != "prefix" or config.full_every or config.mix:
        return ""
    if finish >= 0.5 or not kl < 0.1 * first_kl:
        return ""
    return (f"WARNING: the first {config.prefix_len} tokens are learnt (KL {kl:.3f}, at first {first_kl:.3f}) and "
            "most responses are cut there: training on may spoil what lies beyond. Stop here; or start again and let "
            "the prefix grow (--schedule linear), or learn from some whole responses too (--mix 0.1); the "
            "held-out KL by position in log.jsonl shows it")  # fmt: skip


def supervise_window(rollout: Rollout, length: int, window: str, generator: torch.Generator) -> None:
    """Of whole responses, supervise the first, last or a random run of `length` tokens; all of a shorter one."""
    room = (rollout.lens - length).clamp(min=0)
    start = {"first": room * 0, "last": room,
             "random": (torch.rand(len(room), generator=generator, dtype=torch.float64) * (room + 1)).long()}[window]
    rollout.supervised = torch.stack((start, (start + length).minimum(rollout.lens)), dim=1)


def iw_weights(log_ratio: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """IW-OPD's weights (arXiv 2606.22600): 1 + gamma (1 - F), with F the share of its row's sum of |log_ratio| that
    lies before a token. log_ratio (n,) at the n places of mask (B, T-1); (n,)."""
    size = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    size[mask] = log_ratio.abs().double()
    before = (size.cumsum(1) - size) / size.sum(1, keepdim=True).clamp(min=1e-30)
    return (1 + gamma * (1 - before[mask])).to(log_ratio.dtype)

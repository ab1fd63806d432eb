"""The processes that train one model together, as torchrun starts them. Alone, a process is rank 0 of 1."""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Meet the other processes that torchrun started. From here on only rank 0 prints."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave() -> None:
    """Part from them, when the work is done. A rank that fails does not: it would wait for the others."""
    all_gather(None)  # none is gone while another still reads from it
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather(x) -> list:
    """Every rank's x, on every rank, in the order of ranks. A rank waits here until all have come."""
    if world_size() == 1:
        return [x]
    found = [None] * world_size()
    dist.all_gather_object(found, x)
    return found


def all_reduce(gradients: list[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks."""
    if world_size() > 1:
        for g in gradients:
            dist.all_reduce(g)


# A sharded model's parameters are DTensors (model.py, `shard`): each rank holds a part of every one.


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All ranks must ask for it together. What is computed from a DTensor
    (a norm, a sum) is one rank's part until it goes through here."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def collect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the memory of rank 0, one after the other; nothing on the other ranks."""
    found = {}
    for name, x in tensors.items():
        whole = full_tensor(x.detach())
        if rank() == 0:
            found[name] = whole.cpu().contiguous()
    return found


def like(whole: Tensor, x: Tensor) -> Tensor:
    """`whole` laid out as `x` is: this rank's part of it where x is sharded."""
    if not hasattr(x, "placements"):
        return whole.to(x.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(x.device), x.device_mesh, x.placements, src_data_rank=None)

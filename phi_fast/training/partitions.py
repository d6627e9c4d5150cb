"""Averages and copies of flat partitions between ranks, by messages straight to the ranks that need them.

gloo has no reduce-scatter of its own: an all-reduce sends twice the bytes, and so do its reductions to one rank. Here
each rank sends every other rank the part that it owns, (n - 1)/n of the elements, and the owner adds up what arrives.
The updated parts go back in as many messages. Both together send what one all-reduce does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import World


def sends_directly(world: World) -> bool:
    """Whether the ranks exchange partitions by this module: they do over gloo; NCCL has its own reductions."""
    return world.size > 1 and world.device.type == "cpu"


def average_to_owners(flats: Sequence[Tensor], dtype: torch.dtype, world: World) -> list[Tensor]:
    """Average each flat tensor over the ranks; returns this rank's part of each average, in fp32.

    flats: contiguous tensors of world.size equal parts each, in fp32 or in `dtype`; the average replaces this rank's
    part of an fp32 tensor.
    dtype: the number format in which parts are sent; they are added in fp32.
    """
    parts = [flat.view(world.size, -1) for flat in flats]
    others = _others(world)
    arriving = [
        [_receive(part.new_empty(part.shape[1], dtype=dtype), source, tag) for source in others]
        for tag, part in enumerate(parts)
    ]
    leaving = [_send(part[owner].to(dtype), owner, tag) for tag, part in enumerate(parts) for owner in others]
    averages = [part[world.rank].float() for part in parts]
    for average, messages in zip(averages, arriving, strict=True):
        for message in messages:
            average += _arrived(message)
        average /= world.size
    for message in leaving:
        _arrived(message)
    return averages


def gather(partitions: Sequence[Sequence[Tensor]], world: World) -> None:
    """Copy each rank's tensor of every group to all ranks.

    partitions: by group, then by the rank that owns it: contiguous tensors, of one shape and dtype in each group.
    """
    others = _others(world)
    messages = [_receive(group[owner], owner, tag) for tag, group in enumerate(partitions) for owner in others]
    messages += [_send(group[world.rank], rank, tag) for tag, group in enumerate(partitions) for rank in others]
    for message in messages:
        _arrived(message)


Message = tuple[Tensor, dist.Work]
"""A tensor that must live until its message has arrived, and the wait for that."""


def _others(world: World) -> list[int]:
    """List the other ranks, each rank from its successor on, so that not all of them send to rank 0 first."""
    return [(world.rank + distance) % world.size for distance in range(1, world.size)]


def _receive(tensor: Tensor, source: int, tag: int) -> Message:
    work = dist.irecv(tensor, source, tag=tag)
    assert work is not None  # None means a rank outside of the group
    return tensor, work


def _send(tensor: Tensor, target: int, tag: int) -> Message:
    work = dist.isend(tensor, target, tag=tag)
    assert work is not None
    return tensor, work


def _arrived(message: Message) -> Tensor:
    tensor, work = message
    work.wait()
    return tensor

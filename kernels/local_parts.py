"""The memory behind a tensor: its own, or the local part of a DTensor, which FSDP2 makes of parameters.

A kernel reads memory by address, and a tensor subclass may have none: what has no memory is refused here by name.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


def local_part(name: str, tensor: Any) -> Tensor:
    """The tensor itself, or the part of a DTensor that this rank holds, once it has arrived.

    Raises ValueError for a tensor that does not own strided memory: a FakeTensor or another subclass, a sparse tensor,
    a DTensor whose ranks hold terms of a sum (Partial).
    """
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{name} is a DTensor of {tensor.placements}: expected no Partial; redistribute it first")
        with torch.no_grad():
            tensor = tensor.to_local()
    if _has_dispatch(tensor) and hasattr(tensor, "wait"):  # AsyncCollectiveTensor: a collective is still filling it
        tensor = tensor.wait()
    if _has_dispatch(tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, which may have no memory: expected a torch.Tensor, a Parameter or a "
            "DTensor"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}: expected a dense tensor; call .to_dense()")
    return tensor


def placed(tensor: Any) -> Hashable:
    """How a DTensor is spread over which ranks; None for any other tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_dtensor(tensor) else None


def placed_as(tensor: Any, like: Any) -> Tensor:
    """A DTensor spread as `like` is, over the same mesh; itself where it is that already, or where neither is one."""
    if placed(tensor) == placed(like) or not (is_dtensor(tensor) and is_dtensor(like)):
        return tensor
    return tensor.redistribute(like.device_mesh, like.placements)


def without_partial(tensor: Any) -> Tensor:
    """A DTensor whose Partial terms have been summed over the ranks; any other tensor as it is."""
    if not is_dtensor(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=whole)


def sum_over_shards(value: Tensor, where: Any) -> Tensor:
    """The sum over all shards of a scalar that each rank computed from its own; `where` is the shards' `placed`.
    Ranks that hold copies of one shard count once."""
    if where is None:
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = where
    terms = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(value, mesh, terms).full_tensor()


def scalar(tensor: Any) -> Tensor | None:
    """A scalar that steers a kernel; of a DTensor the value that it has on every rank."""
    return tensor.full_tensor() if tensor is not None and is_dtensor(tensor) else tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a torch.distributed.tensor.DTensor. Imports nothing where it cannot be one."""
    if not _has_dispatch(tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _has_dispatch(tensor: Any) -> bool:
    """A subclass with its own `__torch_dispatch__`: what its operators do need not be about memory of its own."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__

"""The gradient of a weight; the contract is `reference/weight_gradient.py`'s.

On a processor that multiplies tiles (AMX), bf16 products are computed in C++, which packs both operands straight into
tiles; oneDNN transposes one operand first. Every other product is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference import weight_gradient as reference
from ._tensors import described
from .linear_cross_entropy import sum_into_

_OP = "weight_gradient"


def product(a: Tensor, b: Tensor) -> Tensor:
    """See `reference.weight_gradient.product`."""
    if not _by_tiles(a, b):
        return reference.product(a, b)
    out = a.new_empty(a.shape[1], b.shape[1])
    _call(a, b, out, add=False)
    return out


def accumulate_(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """See `reference.weight_gradient.accumulate_`."""
    if _by_tiles(a, b):
        _call(a, b, total, add=not first)
    else:
        reference.accumulate_in_parts_(total, a, b, first=first, sum_into=sum_into_)


def _by_tiles(a: Tensor, b: Tensor) -> bool:
    return cpu.has_weight_gradient() and a.dtype == b.dtype == torch.bfloat16


def _call(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    cpu.weight_gradient(described(_OP, a), described(_OP, b), described(_OP, out), add, torch.get_num_threads())

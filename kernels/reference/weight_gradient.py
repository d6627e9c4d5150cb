"""The gradient of a weight, aᵀ · b over all rows, by torch's matrix products.

The contract of `product` and `accumulate_`, which the C++ back end keeps too, is their docstrings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ · b, accumulated in fp32 and rounded once to a's dtype. a (rows, m), b (rows, n) of one dtype -> (m, n)."""
    return torch.mm(a.T, b)


def accumulate_(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += aᵀ · b, or = where `first`. total (m, n), contiguous, fp32 (fp64 for fp64); a, b as in `product`."""
    accumulate_in_parts_(total, a, b, first=first, sum_into=sum_into_)


def accumulate_in_parts_(total: Tensor, a: Tensor, b: Tensor, *, first: bool, sum_into: Callable[..., None]) -> None:
    """`accumulate_` by products of 8192 rows of `total`: a 16-bit product stays small beside it."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b, beta=0 if first else 1)
        return
    for rows, columns in zip(total.split(8192), a.split(8192, 1), strict=True):
        sum_into(rows, wide_product(columns.T, b), first=first)


def sum_into_(total: Tensor, addend: Tensor, *, first: bool) -> None:
    """total (fp32, contiguous) += addend (contiguous), or total = addend where `first`."""
    if first:
        total.copy_(addend)
    else:
        total.add_(addend)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, accumulated in fp32 (fp64 for fp64) and returned so; but a CPU's bf16 product is rounded once to bf16, as
    a Linear's gradient is."""
    if a.is_cuda and a.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b

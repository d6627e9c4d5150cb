"""The gradient of a weight, aᵀ · b over all rows, by torch's matrix products.

The contract of `product` and `accumulate_`, which the C++ back end keeps too, is their docstrings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ADDS_TO_FP32 = torch.__version__ >= "2.11"
"""Whether `addmm` with `out_dtype` adds a 16-bit product to an fp32 matrix: cuBLAS reads and writes the matrix once and
adds in fp32. In earlier versions the matrix must have 16 bits, too (pytorch/pytorch#167931)."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ · b, accumulated in fp32 and rounded once to a's dtype. a (rows, m), b (rows, n) of one dtype -> (m, n)."""
    return torch.mm(a.T, b)


def accumulate_(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += aᵀ · b, or = where `first`. total (m, n), contiguous, fp32 (fp64 for fp64); a, b as in `product`.

    However often it is called, the sums stay fp32: 16-bit products are accumulated, added and stored so.
    """
    accumulate_in_parts_(total, a, b, first=first, sum_into=sum_into_)


def accumulate_in_parts_(total: Tensor, a: Tensor, b: Tensor, *, first: bool, sum_into: Callable[..., None]) -> None:
    """`accumulate_` by one product wherever torch can add it to `total`, and else by products of 8192 rows of `total`:
    a 16-bit product stays small beside it."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b, beta=0 if first else 1)
    elif first and widens(a):
        wide_product(a.T, b, out=total)
    elif widens(a) and ADDS_TO_FP32:
        torch.addmm(total, a.T, b, out_dtype=total.dtype, out=total)
    else:
        for rows, columns in zip(total.split(8192), a.split(8192, 1), strict=True):
            sum_into(rows, wide_product(columns.T, b), first=first)


def sum_into_(total: Tensor, addend: Tensor, *, first: bool) -> None:
    """total (fp32, contiguous) += addend (contiguous), or total = addend where `first`."""
    if first:
        total.copy_(addend)
    else:
        total.add_(addend)


def wide_product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a · b, accumulated in fp32 (fp64 for fp64) and returned so, in `out` (contiguous) where it is given; but a CPU's
    bf16 product is rounded once to bf16, as a Linear's gradient is."""
    if widens(a):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if out is None or out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(a @ b)


def widens(a: Tensor) -> bool:
    """Whether torch multiplies `a` and writes the fp32 sums as they are: cuBLAS does, for 16-bit operands."""
    return a.is_cuda and a.itemsize == 2

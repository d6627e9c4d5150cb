"""Products of 16-bit matrices with fp32 results on a CPU, which torch has on a GPU alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi_fast.kernels.reference import weight_gradient


def multiply_as_a_gpu(patch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Let 16-bit tensors on a CPU be multiplied as on a GPU, where products give fp32, with torch 2.11's demands on
    dtypes. Returns the list to which each `torch.mm` and `torch.addmm` adds (name, shape of the result)."""
    ran: list[tuple[str, tuple[int, ...]]] = []

    def wrapped(name: str) -> None:
        usual = getattr(torch, name)

        def product(*operands: Tensor, out: Tensor | None = None, **options) -> Tensor:
            wide = options.get("out_dtype") is not None and not operands[0].is_cuda
            result = _widened(*operands, out=out, **options) if wide else usual(*operands, out=out, **options)
            ran.append((name, tuple(result.shape)))
            return result

        patch.setattr(torch, name, product)

    wrapped("mm")
    wrapped("addmm")
    if not torch.cuda.is_available():
        patch.setattr(weight_gradient, "widens", lambda a: a.itemsize == 2)
    return ran


def _widened(*operands: Tensor, out_dtype: torch.dtype, out: Tensor | None) -> Tensor:
    *added, a, b = operands
    assert a.dtype == b.dtype and a.itemsize == 2 and out_dtype == torch.float32, (a.dtype, b.dtype, out_dtype)
    assert all(x.dtype == torch.float32 for x in (*added, out) if x is not None)
    result = sum(added, a.float() @ b.float())
    return result if out is None else out.copy_(result)

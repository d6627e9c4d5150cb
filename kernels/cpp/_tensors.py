"""How tensors go to `phi_fast._C.cpu`: with dtype, sizes and strides, which each entry checks (csrc/cpu/tensors.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import readable

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3, torch.int32: 4}
Described = tuple[int, int, torch.Size, tuple[int, ...]]
"""Address, dtype, sizes and strides of a tensor."""


def described(op: str, x: Tensor) -> Described:
    """`x` as an entry of `phi_fast._C.cpu` takes it. The one place of this back end where an address is taken.

    Raises TypeError for a tensor whose elements do not lie at its address or whose dtype the kernels do not have,
    ValueError for one that is not on the CPU.
    """
    if not readable(x):
        raise TypeError(
            f"{type(x).__name__} {tuple(x.shape)}: the C++ kernels take plain tensors with memory of their own"
        )
    if x.device.type != "cpu":
        raise ValueError(f"a tensor {tuple(x.shape)} is on {x.device}; expected the CPU")
    if x.dtype not in _CODES:
        raise TypeError(
            f"{op}: the C++ kernels take float32, bfloat16 and float16, not {x.dtype}; use('reference', op={op!r})"
        )
    return x.data_ptr(), _CODES[x.dtype], x.shape, x.stride()


def maybe(op: str, x: Tensor | None) -> Described | None:
    """`described`, or None for None."""
    return None if x is None else described(op, x)


def wide(x: Tensor) -> Tensor:
    """`x` as contiguous fp32; itself where it is that already. Must outlive the call that it is described to."""
    return x.float().contiguous()

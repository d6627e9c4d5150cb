"""How tensors go to `phi_fast._C.cpu`: addresses, strides and dtype codes, after the checks that keep memory safe."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import readable

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def code(op: str, dtype: torch.dtype) -> int:
    """The kernels' number for `dtype`. Raises TypeError for one they do not have."""
    if dtype not in _CODES:
        raise TypeError(
            f"{op}: the C++ kernels take float32, bfloat16 and float16, not {dtype}; use('reference', op={op!r})"
        )
    return _CODES[dtype]


def matrix(op: str, name: str, x: Tensor | None, like: Tensor) -> tuple[int, int]:
    """(address, row stride) of a (rows, columns) tensor of `like`'s shape and dtype; (0, 0) for None."""
    if x is None:
        return 0, 0
    if x.shape != like.shape or x.dtype != like.dtype or x.device.type != "cpu" or not _rows_are_whole(x):
        raise ValueError(
            f"{op}: {name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}; expected "
            f"{like.dtype} {tuple(like.shape)} with last stride 1 on the CPU"
        )
    return address(x), x.stride(0)


def vector(op: str, name: str, x: Tensor, length: int) -> Tensor:
    """`x` as contiguous fp32 of that length; itself where it is that already."""
    if x.shape != (length,) or x.device.type != "cpu":
        raise ValueError(f"{op}: {name} is {tuple(x.shape)} on {x.device}; expected ({length},) on the CPU")
    return x.float().contiguous()


def address(x: Tensor | None) -> int:
    """Where the first element is; 0 for None. The one place of this back end where an address is taken.

    Raises TypeError for a tensor whose elements do not lie at its address, ValueError for one that is not on the CPU.
    """
    if x is None:
        return 0
    if not readable(x):
        raise TypeError(
            f"{type(x).__name__} {tuple(x.shape)}: the C++ kernels take plain tensors with memory of their own"
        )
    if x.device.type != "cpu":
        raise ValueError(f"a tensor {tuple(x.shape)} is on {x.device}; expected the CPU")
    return x.data_ptr()


def _rows_are_whole(x: Tensor) -> bool:
    return x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] <= 1 or not x.numel())

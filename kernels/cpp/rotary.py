"""Rotary position embedding in C++; the contract is `reference/rotary.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import address, code

_OP = "rotary"


def rotate_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: int | Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """See `reference.rotary.rotate_`.

    Raises TypeError for another dtype, ValueError for a shape or stride, IndexError for a position outside the table.
    """
    dtype = code(_OP, x.dtype)
    half = cos.shape[1]
    if x.stride(3) != 1 or 2 * half > x.shape[3] or sin.shape != cos.shape:
        raise ValueError(
            f"rotary: x {tuple(x.shape)} with strides {x.stride()}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            "expected last stride 1 and two tables (positions, rotary_dim / 2) with rotary_dim <= head_dim"
        )
    offset, given = (positions, None) if isinstance(positions, int) else (0, positions.long().contiguous())
    if given is None and not 0 <= offset <= cos.shape[0] - x.shape[1]:
        raise IndexError(
            f"rotary: rows {offset} to {offset + x.shape[1]} reach past the table's {cos.shape[0]} positions"
        )
    if given is not None and given.shape != x.shape[:2]:
        raise ValueError(f"rotary: positions are {tuple(given.shape)}; expected {tuple(x.shape[:2])}")
    wide_cos, wide_sin = cos.float().contiguous(), sin.float().contiguous()
    cpu.rotary(
        dtype,
        tuple(x.shape[:3]),
        address(x),
        x.stride()[:3],
        address(wide_cos),
        address(wide_sin),
        cos.shape[0],
        half,
        address(given),
        offset,
        interleaved,
        inverse,
        torch.get_num_threads(),
    )

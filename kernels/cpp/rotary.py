"""Rotary position embedding in C++; the contract is `reference/rotary.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import described, maybe, wide

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
    offset, given = (positions, None) if isinstance(positions, int) else (0, positions.long().contiguous())
    wide_cos, wide_sin = wide(cos), wide(sin)
    cpu.rotary(
        described(_OP, x),
        described(_OP, wide_cos),
        described(_OP, wide_sin),
        maybe(_OP, given),
        offset,
        interleaved,
        inverse,
        torch.get_num_threads(),
    )

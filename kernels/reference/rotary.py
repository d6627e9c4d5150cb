"""Rotary position embedding in plain PyTorch: RoFormer (Su et al., arXiv 2104.09864), eq. 34."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: int | Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """Rotates the first 2 * cos.shape[1] dims of every head of x in place; the others are not read or written.

    x (batch, sequence, heads, head_dim), any strides. cos, sin (max_positions, rotary_dim / 2), fp32 or fp64.
    positions: an int p (row s takes position p + s), or an integer tensor (batch, sequence). Dim i is rotated
    with dim i + rotary_dim / 2 (half-split, as in GPT-NeoX) or, interleaved, dim 2i with 2i + 1 (as in GPT-J). inverse
    rotates the other way, which is the gradient. The arithmetic is fp32 (fp64 for fp64), rounded once.
    """
    half = cos.shape[1]
    if isinstance(positions, int):
        rows = slice(positions, positions + x.shape[1])
        c, s = cos[rows, None], sin[rows, None]  # (S, 1, half)
    else:
        c, s = cos[positions][:, :, None], sin[positions][:, :, None]  # (B, S, 1, half)
    if inverse:
        s = -s
    turning = x[..., : 2 * half]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :half], turning[..., half:]
    wide = torch.promote_types(x.dtype, torch.float32)
    a_wide, b_wide = a.to(wide), b.to(wide)
    new_a, new_b = a_wide * c - b_wide * s, b_wide * c + a_wide * s
    a.copy_(new_a)
    b.copy_(new_b)

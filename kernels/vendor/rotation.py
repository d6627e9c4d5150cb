"""Rotation around attention of libraries that do not rotate: q and k are copied, and their gradients turned back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.attention import AttentionOptions, rotate, row_positions


def rotated(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """q and k, (batch, sequence, heads, head_dim), as `options` rotates them; themselves where it does not."""
    *_, cu_seqlens, cos, sin = options
    if cos is None:
        return q, k
    own, positions = row_positions(q, k, cu_seqlens)
    wide = torch.promote_types(q.dtype, torch.float32)
    return rotate(q.to(wide), cos, sin, own).to(q.dtype), rotate(k.to(wide), cos, sin, positions).to(k.dtype)


def turn_back_(dq: Tensor, dk: Tensor, options: AttentionOptions) -> None:
    """Turn the gradients of the rotated q and k into those of q and k, in place."""
    *_, cu_seqlens, cos, sin = options
    if cos is None:
        return
    own, positions = row_positions(dq, dk, cu_seqlens)
    wide = torch.promote_types(dq.dtype, torch.float32)
    dq.copy_(rotate(dq.to(wide), cos, sin, own, inverse=True))
    dk.copy_(rotate(dk.to(wide), cos, sin, positions, inverse=True))

"""Attention by torch's own fused kernels, called below autograd so that out and log-sum-exp are saved once.

On a CPU: the flash kernel of ATen. On a GPU: FlashAttention as torch ships it, so fp16 or bf16. Neither takes
documents or rotates: each document is a call of its own, and q and k are first copied and rotated.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..reference.attention import AttentionOptions
from .rotation import rotated, turn_back_

_aten = torch.ops.aten


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.attention.forward`."""
    scale, causal, window, cu_seqlens, *_ = options
    _refuse_band(q, k, causal, window)
    q, k = rotated(q, k, options)
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows in _document_slices(max(q.shape[1], k.shape[1]), cu_seqlens):
        heads = (_by_head(x, rows, q.shape[2]) for x in (q, k, v))
        if q.device.type == "cpu":
            document, document_lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, scale=scale)
        else:
            document, document_lse, *_ = _aten._scaled_dot_product_flash_attention(*heads, 0.0, causal, scale=scale)
        out[:, rows] = document.transpose(1, 2)
        lse[:, :, rows] = document_lse[:, :, : document.shape[2]]
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Same contract as `reference.attention.backward`."""
    scale, causal, window, cu_seqlens, *_ = options
    _refuse_band(q, k, causal, window)
    q, k = rotated(q, k, options)
    for rows in _document_slices(max(q.shape[1], k.shape[1]), cu_seqlens):
        saved = [_by_head(x, rows, q.shape[2]) for x in (dout, q, k, v, out)]
        document_lse = lse[:, :, rows]
        if q.device.type == "cpu":
            gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *saved, document_lse, 0.0, causal, scale=scale
            )
        else:
            lengths = saved[1].shape[2], saved[2].shape[2]
            no_dropout = torch.empty(0, dtype=torch.uint64, device=q.device)
            gradients = _aten._scaled_dot_product_flash_attention_backward(
                *saved, document_lse, None, None, *lengths, 0.0, causal, no_dropout, no_dropout, scale=scale
            )
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            shared = gradient.unflatten(1, (target.shape[2], -1)).sum(2) if target.shape[2] != q.shape[2] else gradient
            target[:, rows] = shared.transpose(1, 2)
    turn_back_(dq, dk, options)


def _refuse_band(q: Tensor, k: Tensor, causal: bool, window: tuple[int, int] | None) -> None:
    if window not in (None, (-1, -1)) or (causal and q.shape[1] != k.shape[1]):
        raise ValueError(
            f"sdpa's kernels take no window and, where causal, no keys of another number: window={window}, "
            f"{q.shape[1]} queries, {k.shape[1]} keys; use('cpp', 'triton' or 'reference', op='attention')"
        )


def _by_head(x: Tensor, rows: slice, heads: int) -> Tensor:
    """(B, S, h, D) -> (B, heads, rows, D), a view unless key heads are shared, which torch's kernels want repeated."""
    return (
        x[:, rows].transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)
        if x.shape[2] != heads
        else x[:, rows].transpose(1, 2)
    )


def _document_slices(length: int, cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is None:
        return [slice(0, length)]
    return [slice(*ends) for ends in itertools.pairwise(cu_seqlens.tolist()) if ends[0] != ends[1]]

"""Attention by FlashAttention-4 (PyPI flash-attn-4, written in CuTe; 4.0.0b36 was read): sm_90 and newer, 16 bits.

Called below its autograd, so that out and log-sum-exp are saved once. It does not rotate: q and k are copied and
rotated first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backend import BackendUnavailable
from ..reference.attention import AttentionOptions
from .rotation import rotated, turn_back_

try:
    from flash_attn.cute import interface as _flash
except ImportError as error:
    raise BackendUnavailable(
        "attention: FlashAttention-4 cannot be imported: pip install --pre flash-attn-4, or use('auto', op='attention')"
    ) from error


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.attention.forward`."""
    joined = options.cu_seqlens is not None
    operands = [x[0] if joined else x for x in (*rotated(q, k, options), v)]
    result, lse, *_ = _flash._flash_attn_fwd(*operands, **_options(options, q.shape[1]), return_lse=True)
    result, lse = (result[None], lse[None]) if joined else (result, lse)
    return (result if out is None else out.copy_(result)), lse


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
    """Same contract as `reference.attention.backward`, by its deterministic mode."""
    joined = options.cu_seqlens is not None
    operands = [x[0] if joined else x for x in (*rotated(q, k, options), v, out, dout, lse)]
    gradients = _flash._flash_attn_bwd(*operands, **_options(options, q.shape[1]), deterministic=True)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient[None] if joined else gradient)
    turn_back_(dq, dk, options)


def _options(options: AttentionOptions, length: int) -> dict[str, Any]:
    """Keywords of FlashAttention-4's functions, where None means a window without a limit."""
    scale, causal, window, cu_seqlens, *_ = options
    left, right = (None if side < 0 else side for side in window or (-1, -1))
    given = {"softmax_scale": scale, "causal": causal, "window_size_left": left, "window_size_right": right}
    if cu_seqlens is None:
        return given
    # The longest document's length would wait for the device; the joined length is a bound.
    ends = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens)
    return {**given, **ends, **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), length)}

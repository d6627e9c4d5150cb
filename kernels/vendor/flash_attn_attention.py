"""Attention by the flash-attn package (https://github.com/Dao-AILab/flash-attention): GPUs, fp16 and bf16.

Called below its autograd, so that out and log-sum-exp are saved once. It does not rotate: q and k are copied and
rotated first.
"""

from __future__ import annotations

from torch import Tensor

from ..backend import BackendUnavailable
from ..reference.attention import AttentionOptions
from .rotation import rotated, turn_back_

try:
    from flash_attn import flash_attn_interface as _flash
except ImportError as error:
    raise BackendUnavailable(
        "attention: flash-attn cannot be imported: pip install flash-attn --no-build-isolation (it needs a CUDA "
        "compiler), or use('auto', op='attention')"
    ) from error


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
    q, k = rotated(q, k, options)
    if cu_seqlens is None:
        result, lse, *_ = _flash._flash_attn_forward(q, k, v, **_options(scale, causal, window), return_softmax=False)
    else:
        result, lse, *_ = _flash._flash_attn_varlen_forward(
            q[0],
            k[0],
            v[0],
            **_documents(cu_seqlens, q.shape[1]),
            **_options(scale, causal, window),
            return_softmax=False,
        )
        result, lse = result[None], lse[None]  # (1, T, heads, head_dim), (1, heads, T)
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
    """Same contract as `reference.attention.backward`, by flash-attn's deterministic mode."""
    scale, causal, window, cu_seqlens, *_ = options
    q, k = rotated(q, k, options)
    operands = (dout, q, k, v, out, lse, dq, dk, dv)
    if cu_seqlens is None:
        _flash._flash_attn_backward(*operands, **_options(scale, causal, window), deterministic=True)
    else:
        _flash._flash_attn_varlen_backward(
            *(x[0] for x in operands),
            **_documents(cu_seqlens, q.shape[1]),
            **_options(scale, causal, window),
            deterministic=True,
        )
    turn_back_(dq, dk, options)


def _options(scale: float, causal: bool, window: tuple[int, int] | None) -> dict[str, object]:
    left, right = window or (-1, -1)
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _documents(cu_seqlens: Tensor, length: int) -> dict[str, object]:
    # Reading the longest document's length would wait for the device; the joined length is a valid bound.
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": length,
        "max_seqlen_k": length,
    }

"""Attention by cuDNN, as torch ships it (torch.nn.attention's CUDNN_ATTENTION): GPUs, fp16 and bf16.

Called below autograd, so that out and log-sum-exp are saved once. It takes no documents and no window here, and it does
not rotate: q and k are copied and rotated first. Its backward may add in another order in each run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.attention import AttentionOptions
from .rotation import rotated, turn_back_

_aten = torch.ops.aten


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.attention.forward`. Raises ValueError for documents, a window, or grouped heads."""
    _refuse(q, k, options)
    heads = (x.transpose(1, 2) for x in (*rotated(q, k, options), v))
    result, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *heads, None, True, 0.0, options.causal, False, scale=options.scale
    )
    result = result.transpose(1, 2)
    return (result if out is None else out.copy_(result)), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


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
    """Same contract as `reference.attention.backward`. Raises ValueError as `forward` does."""
    _refuse(q, k, options)
    heads = (x.transpose(1, 2) for x in (dout, *rotated(q, k, options), v, out))
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    lengths = q.shape[1], k.shape[1]
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        *heads,
        lse.unsqueeze(-1),
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        *lengths,
        0.0,
        options.causal,
        scale=options.scale,
    )
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient.transpose(1, 2))
    turn_back_(dq, dk, options)


def _refuse(q: Tensor, k: Tensor, options: AttentionOptions) -> None:
    band = options.window not in (None, (-1, -1)) or (options.causal and q.shape[1] != k.shape[1])
    if band or options.cu_seqlens is not None or q.shape[2] != k.shape[2]:
        raise ValueError(
            "cudnn takes no documents, no window, as many key heads as query heads and, where causal, as many keys as "
            f"queries: window={options.window}, queries {tuple(q.shape)}, keys {tuple(k.shape)}; use('triton', "
            "op='attention')"
        )

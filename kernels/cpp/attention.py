"""Attention in C++; the contract is `reference/attention.py`'s, for fp32, bf16 and fp16.

Where the processor multiplies bf16 (AVX-512 BF16), probabilities and score gradients are rounded to bf16 for the
products, as FlashAttention does on a GPU; else they are fp32. Sums and softmax are fp32 always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference.attention import AttentionOptions, band, check_documents
from ._tensors import described, maybe, wide

_OP = "attention"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.attention.forward`. Raises TypeError for another dtype, ValueError for a stride or document."""
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _call([q, k, v, out], lse, options)
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
    """See `reference.attention.backward`. Raises as `forward` does."""
    _call([q, k, v, out, dout, dq, dk, dv], lse, options)


def _call(tensors: list[Tensor], lse: Tensor, options: AttentionOptions) -> None:
    scale, causal, window, cu_seqlens, cos, sin = options
    sequence, keys = tensors[0].shape[1], tensors[1].shape[1]
    check_documents(sequence, cu_seqlens, cos)
    documents = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    tables = [None if table is None else wide(table) for table in (cos, sin)]
    cpu.attention(
        [described(_OP, x) for x in tensors],
        described(_OP, lse),
        maybe(_OP, documents),
        *(maybe(_OP, table) for table in tables),
        scale,
        *band(sequence, keys, causal, window),
        torch.get_num_threads(),
    )

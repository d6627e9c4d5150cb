"""Attention in C++; the contract is `reference/attention.py`'s, for fp32, bf16 and fp16.

Where the processor multiplies bf16 (AVX-512 BF16), probabilities and score gradients are rounded to bf16 for the
products, as FlashAttention does on a GPU; else they are fp32. Sums and softmax are fp32 always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference.attention import band, check_documents
from ._tensors import address, code

_OP = "attention"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    scale: float,
    causal: bool,
    window: tuple[int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.attention.forward`. Raises TypeError for another dtype, ValueError for a stride or document."""
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _call([q, k, v, out], lse, scale, causal, window, cu_seqlens, cos, sin)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """See `reference.attention.backward`. Raises as `forward` does."""
    _call([q, k, v, out, dout, dq, dk, dv], lse, scale, causal, window, cu_seqlens, cos, sin)


def _whole(x: Tensor) -> bool:
    return x.stride(3) == 1 or x.shape[3] <= 1 or not x.numel()


def _call(
    tensors: list[Tensor],
    lse: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int] | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    q, k = tensors[:2]
    batch, sequence, heads, head_dim = q.shape
    for name, x in zip(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), tensors, strict=False):
        like = k if name in ("k", "v", "dk", "dv") else q
        if x.shape != like.shape or x.dtype != q.dtype or x.device.type != "cpu" or not _whole(x):
            raise ValueError(
                f"{_OP}: {name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}; expected "
                f"{q.dtype} {tuple(like.shape)} with last stride 1 on the CPU"
            )
    if lse.shape != (batch, heads, sequence) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(
            f"{_OP}: lse is {lse.dtype} {tuple(lse.shape)}; expected contiguous float32 {(batch, heads, sequence)}"
        )
    check_documents(sequence, cu_seqlens, cos)
    documents = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    tables = [None if table is None else table.float().contiguous() for table in (cos, sin)]
    cpu.attention(
        code(_OP, q.dtype),
        (batch, sequence, k.shape[1], heads, k.shape[2], head_dim),
        [(address(x), *x.stride()[:3]) for x in tensors],
        address(lse),
        address(documents),
        0 if documents is None else len(documents) - 1,
        *(address(table) for table in tables),
        0 if cos is None else cos.shape[1],
        scale,
        *band(sequence, k.shape[1], causal, window),
        torch.get_num_threads(),
    )

"""Softmax attention that keeps no score matrix: FlashAttention (Dao et al., arXiv 2205.14135 and 2307.08691)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import autocast, backend, dispatch
from .reference.attention import AttentionOptions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v.

    q (batch, sequence, heads, head_dim); k, v (batch, keys, key_heads, head_dim), heads a multiple of key_heads
    (grouped-query attention); one dtype of fp16, bf16, fp32, fp64 (Triton: not fp64); any strides with the last one 1,
    so slices of a packed buffer are read where they lie. Scores, softmax and sums are fp32 (fp64 for fp64). Returns
    (batch, sequence, heads, head_dim) in q's dtype.

    Rows are aligned with the last keys, as in flash-attention from version 2.1 on: row i stands at key
    i + keys - sequence.
    causal: a row sees the key it stands at and those before it.
    window (left, right): of these, at most so many keys before and after the one it stands at; -1: no limit.
    Blocks of keys that no row of a block of rows sees are skipped, forward and backward. A row that sees no key gives
    0, and its gradient is 0.
    scale: None means head_dim ** -0.5.
    cu_seqlens: (documents + 1,) int32, 0 = first <= ... <= last = sequence = keys, with batch 1: documents joined end
    to end, none of which sees another. On a GPU its values are not checked, which would wait for the GPU.
    cos, sin: (positions, rotary_dim / 2) fp32 from `rotary_table`: the first rotary_dim of each head's dims of q and k
    are rotated in half-split pairs while they are read, a key by its place in its document, a row by that of the key
    it stands at; the gradients come back unrotated. The table must cover the longest document (on a GPU, where
    cu_seqlens is not read, all keys), and sequence <= keys.

    Under torch.autocast q, k and v are cast to its dtype, as torch's scaled_dot_product_attention does.
    The backward is deterministic: no atomics, so two runs give the same bits. A second derivative is refused
    (NotImplementedError).

    Raises ValueError for a shape, stride, device or window that does not fit, TypeError for a dtype, each naming
    the value.
    """
    by_library = dispatch.by_library("attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens, cos=cos, sin=sin)
    if autocast.active(q):
        q, k, v = (autocast.lowered(x) for x in (q, k, v))
    _check(q, k, v, cu_seqlens, cos, sin)
    _check_window(window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a positive, finite number")
    if by_library:
        return _forward_op(q, k, v, scale, causal, window, cu_seqlens, cos, sin)[0]
    return _Attention.apply(q, k, v, scale, causal, window, cu_seqlens, cos, sin)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *given):
        options = AttentionOptions(*given)
        out, lse = backend.attention_for(q, k, options).forward(q, k, v, options)
        _save(ctx, (q, k, v, out, lse), options)
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors, options = _saved(ctx)
        backward = _backward_op if dispatch.backward_by_library("attention", dout) else _gradients
        return *backward(dout, *tensors, *options), *[None] * 6


def _save(ctx: Any, tensors: tuple[Tensor, ...], options: AttentionOptions) -> None:
    ctx.save_for_backward(*tensors, *options[3:])
    ctx.options = options[:3]


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], AttentionOptions]:
    saved = ctx.saved_tensors
    return saved[:5], AttentionOptions(*ctx.options, *saved[5:])


@autocast.off
def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    given = AttentionOptions(*options)
    backend.attention_for(q, k, given).backward(dout, q, k, v, out, lse, given, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


# Under torch.compile the graph holds two opaque ops. In eager autograd.Function is cheaper to enter.
@torch.library.custom_op("phi_fast::attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: list[int] | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    options = AttentionOptions(scale, causal, window, cu_seqlens, cos, sin)  # type: ignore[arg-type]
    return backend.attention_for(q, k, options).forward(q, k, v, options, out=q.new_empty(q.shape))


@_forward_op.register_fake
def _(q, k, v, scale, causal, window, cu_seqlens, cos, sin):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=statistics)


@torch.library.custom_op("phi_fast::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: list[int] | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dout, q, k, v, out, lse, scale, causal, window, cu_seqlens, cos, sin)


@_backward_op.register_fake
def _(dout, q, k, v, out, lse, scale, causal, window, cu_seqlens, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    _save(ctx, (*inputs[:3], *output), AttentionOptions(*inputs[3:]))
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dout, dlse):
    tensors, options = _saved(ctx)
    gradients = (None, None, None) if dout is None else _backward_op(dout, *tensors, *options)
    return *gradients, *[None] * 6


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
dispatch.once("attention", _backward_op)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[3] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (batch, sequence, heads, head_dim)")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} is {x.dtype}; expected float16, bfloat16, float32 or float64")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q is on {q.device}; move them to one device")
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(f"{name}'s last stride is {x.stride(-1)}; expected 1, call .contiguous() on it")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v has {tuple(v.shape)}; expected the same")
    batch, sequence, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k has {tuple(k.shape)}; batch and head_dim must be the same"
        )
    if heads == 0 or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"{heads} query heads cannot be shared out over {k.shape[2]} key heads; expected a multiple")
    if k.shape[1] != sequence and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens needs as many keys as rows, not {k.shape[1]} for {sequence}; leave it out")
    if cu_seqlens is not None:
        check_documents(cu_seqlens, q)
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'} is None and the other is not; give both or neither")
    if cos is not None and sin is not None:
        _check_rotary(cos, sin, q, k.shape[1], documents=cu_seqlens is not None and q.device.type == "cpu")


def check_documents(cu_seqlens: Tensor, q: Tensor) -> None:
    """Raises TypeError or ValueError for a cu_seqlens that q (or x), with the batch first, cannot have."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; expected int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (documents + 1,)")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch 1, not {q.shape[0]}: join the rows, or leave cu_seqlens out")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q is on {q.device}; move them to one device")


def _check_rotary(cos: Tensor, sin: Tensor, q: Tensor, keys: int, *, documents: bool) -> None:
    """documents: the kernel will look at their lengths, and the table needs no row beyond the longest."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; expected (positions, rotary_dim / 2) for both cos and sin"
            )
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {table.dtype}; expected float32, as rotary_table makes it")
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device} and q is on {q.device}; move them to one device")
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(f"cos and sin rotate {2 * cos.shape[1]} dims and head_dim is {q.shape[3]}; expected no more")
    if q.shape[1] > keys:
        raise ValueError(
            f"cos and sin need no more rows than keys, not {q.shape[1]} for {keys}: the first rows stand before key 0"
        )
    if not documents and cos.shape[0] < keys:
        raise ValueError(f"cos and sin have {cos.shape[0]} positions for a sequence of {keys}; make a longer table")


def _check_window(window: tuple[int, int] | None) -> None:
    if window is None:
        return
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not pair or not all(isinstance(side, int) and side >= -1 for side in window):
        raise ValueError(f"window is {window}; expected (left, right), each a number of keys or -1 for no limit")

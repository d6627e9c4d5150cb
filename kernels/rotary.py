"""Rotary position embedding in place, on the first dims of each head: RoFormer (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, dispatch
from .reference.attention import check_documents, document_positions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rotary_table(
    length: int,
    rotary_dim: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position × base^(-2i / rotary_dim), each (length, rotary_dim / 2).

    The angles are fp32, as in transformers; a 16-bit angle at position 2047 is off by radians. dtype: of cos and sin,
    float32, or float64 for a float64 model. Raises ValueError for an odd rotary_dim or another dtype.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim}: expected an even number, dims rotate in pairs")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: expected float32 or float64; the ops read the table in fp32 whatever x is")
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    frequency = 1.0 / base**exponent
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).to(dtype)
    return angle.cos(), angle.sin()


def apply_rotary_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: int = 0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotates q and k in place, and returns them.

    q (batch, sequence, heads, head_dim); k the same with its own number of heads, or None. fp16, bf16, fp32 or fp64
    (Triton: not fp64); any strides with the last one 1. The q and k of a packed (batch, sequence, 3, heads, head_dim)
    buffer are one call: q = qkv[:, :, :2].flatten(2, 3), k = None.
    cos, sin (max_positions, rotary_dim / 2) from `rotary_table`: the first rotary_dim of head_dim rotate, the others
    are neither read nor written. Half-split pairs (i, i + rotary_dim / 2), or interleaved pairs (2i, 2i + 1).

    The position of row s is offset + s; or positions[b, s], an int32 or int64 tensor (batch, sequence); or, with
    cu_seqlens (documents + 1,) int32 and batch 1, s less the start of its document. At most one of the three. A
    position outside the table raises on a CPU; on a GPU, where looking would be a sync, it makes the row NaN.

    The arithmetic is fp32. The gradient is the inverse rotation, to any order. Raises ValueError for a shape, stride,
    device or option that does not fit, TypeError for a dtype, each naming the value.
    """
    if sum((offset != 0, positions is not None, cu_seqlens is not None)) > 1:
        raise ValueError("offset, positions and cu_seqlens each say where the rows are; give one of them")
    tensors = {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions, "cu_seqlens": cu_seqlens}
    by_library = dispatch.by_library("apply_rotary_", **tensors)
    _check_table(cos, sin, q.device)
    for name, x in (("q", q), ("k", k)):
        if x is not None:
            _check(name, x, cos)
    if k is not None and (k.shape[:2] != q.shape[:2] or k.device != q.device):
        raise ValueError(
            f"q is {tuple(q.shape)} on {q.device} and k {tuple(k.shape)} on {k.device}: expected one batch, sequence "
            "and device"
        )
    where = _positions(q, cos, offset, positions, cu_seqlens, look=not by_library)
    rotate_ = _rotate_by_library_ if by_library else _Rotary.apply
    rotated_q = rotate_(q, cos, sin, where, interleaved)
    return rotated_q, None if k is None else rotate_(k, cos, sin, where, interleaved)


def _rotate_by_library_(x: Tensor, cos: Tensor, sin: Tensor, positions: int | Tensor, interleaved: bool) -> Tensor:
    return x.copy_(_rotated_by_library(x, cos, sin, positions, interleaved, False))


def _rotated_by_library(
    x: Tensor, cos: Tensor, sin: Tensor, positions: int | Tensor, interleaved: bool, inverse: bool
) -> Tensor:
    offset, tensor = (0, positions) if isinstance(positions, Tensor) else (positions, None)
    return _rotary_op(x, cos, sin, tensor, offset, interleaved, inverse)


def _rotated_copy(
    x: Tensor, cos: Tensor, sin: Tensor, positions: int | Tensor, interleaved: bool, inverse: bool
) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    kernels = backend.implementation("rotary", x.device)
    kernels.rotate_(result, cos, sin, positions, interleaved=interleaved, inverse=inverse)
    return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved):
        kernels = backend.implementation("rotary", x.device)
        kernels.rotate_(x, cos, sin, positions, interleaved=interleaved)
        ctx.mark_dirty(x)
        tensor = positions if isinstance(positions, Tensor) else None
        ctx.save_for_backward(cos, sin, tensor)
        ctx.offset, ctx.interleaved = positions, interleaved
        return x

    @staticmethod
    def backward(ctx, dout):
        cos, sin, tensor = ctx.saved_tensors
        positions = ctx.offset if tensor is None else tensor
        rotated = _rotated_by_library if dispatch.backward_by_library("apply_rotary_", dout) else _rotated_copy
        return rotated(dout, cos, sin, positions, ctx.interleaved, True), None, None, None, None


@torch.library.custom_op("phi_fast::rotary", mutates_args=())
def _rotary_op(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool, inverse: bool
) -> Tensor:
    """Out of place, because an op that mutates cannot have a gradient: the compiler makes the copy back disappear."""
    return _rotated_copy(x, cos, sin, offset if positions is None else positions, interleaved, inverse)


@_rotary_op.register_fake
def _(x, cos, sin, positions, offset, interleaved, inverse):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, cos, sin, positions, offset, interleaved, inverse = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.offset, ctx.interleaved, ctx.inverse = offset, interleaved, inverse


def _op_backward(ctx, dout):
    cos, sin, positions = ctx.saved_tensors
    dx = _rotary_op(dout, cos, sin, positions, ctx.offset, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None, None, None


_rotary_op.register_autograd(_op_backward, setup_context=_setup_context)


def _positions(
    q: Tensor, cos: Tensor, offset: int, positions: Tensor | None, cu_seqlens: Tensor | None, *, look: bool
) -> int | Tensor:
    """What the primitives take: an int, or a tensor (batch, sequence). look: the values can be read."""
    batch, sequence = q.shape[:2]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected int32 (documents + 1,)"
            )
        if batch != 1:
            raise ValueError(f"cu_seqlens needs batch 1, not {batch}: join the rows, or leave cu_seqlens out")
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q is on {q.device}; move them to one device")
        if look:
            check_documents(sequence, cu_seqlens, None)
        positions = document_positions(sequence, cu_seqlens, q.device)[None]
    if positions is None:
        if offset < 0 or offset + sequence > cos.shape[0]:
            raise ValueError(
                f"offset={offset} and a sequence of {sequence} reach past the table's {cos.shape[0]} positions; make a "
                "longer table"
            )
        return offset
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions are {positions.dtype}; expected int32 or int64")
    if positions.shape != (batch, sequence) or positions.device != q.device:
        raise ValueError(
            f"positions {tuple(positions.shape)} on {positions.device}: expected {(batch, sequence)} on {q.device}"
        )
    if look and positions.device.type == "cpu" and positions.numel():
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions run from {low} to {high}; the table has 0 to {cos.shape[0] - 1}")
    return positions


def _check_table(cos: Tensor, sin: Tensor, device: torch.device) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape or table.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; expected (max_positions, rotary_dim / 2) for both cos and sin"
            )
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {table.dtype}; expected float32, as rotary_table makes it")
        if table.device != device:
            raise ValueError(f"{name} is on {table.device} and q is on {device}; move them to one device")


def _check(name: str, x: Tensor, cos: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (batch, sequence, heads, head_dim)")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}; expected float16, bfloat16, float32 or float64")
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"{name}'s last stride is {x.stride(-1)}; expected 1, rotate before transposing")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{name}'s strides are {x.stride()}: a row that stands for several would turn more than once")
    if 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(f"cos and sin rotate {2 * cos.shape[1]} dims and {name}'s head_dim is {x.shape[3]}")

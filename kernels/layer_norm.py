"""Layer normalisation (Ba et al., arXiv 1607.06450) with fp32 statistics, and a residual sum in the same pass."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import autocast, backend, dispatch
from .reference.layer_norm import ResidualStream

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim.

    x (..., d); weight, bias (d,) or None; fp16, bf16, fp32 or fp64 (Triton: not fp64). The result has x's dtype. If
    the dtypes differ, everything is computed in the promoted dtype and rounded once. Under torch.autocast on a
    GPU the result is at least fp32, as F.layer_norm's. Rows at any stride; where x cannot be viewed as (rows, d) with
    last stride 1 it is copied. Statistics and arithmetic are fp32.

    residual, shaped as x: returns (layer_norm(x + residual), x + residual) from one pass, for blocks that continue
    with the sum; without it, the normalised tensor alone. The sum has torch's dtype of x + residual. One backward pass
    takes the gradients of both outputs.

    The backward is deterministic: weight gradients are partial sums of fixed rows, added in a fixed order. A second
    derivative is refused (NotImplementedError).
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype, each naming the value.
    """
    by_library = dispatch.by_library("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    weight = x.new_ones(x.shape[-1:]) if weight is None else weight
    bias = x.new_zeros(x.shape[-1:]) if bias is None else bias
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_cuda and autocast.active(x) else x.dtype
    check(x, {"weight": weight, "bias": bias}, residual)
    carried = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = functools.reduce(torch.promote_types, (weight.dtype, bias.dtype, carried), dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    if wide != x.dtype:
        residual = None if residual is None else residual.to(wide)
        out = layer_norm(x.to(wide), weight, bias, eps, residual=residual)
        return out.to(dtype) if isinstance(out, Tensor) else (out[0].to(dtype), out[1].to(carried))
    residual = None if residual is None else residual.to(wide)
    if by_library:
        out, summed, *_ = _forward_op(x, weight, bias, eps, residual)
    elif residual is None:
        return _LayerNorm.apply(x, weight, bias, eps)
    else:
        out, summed = _LayerNormOfSum.apply(x, residual, weight, bias, eps)
    return out if residual is None else (out, summed)


def rows_of(x: Tensor) -> Tensor:
    """(..., d) -> (rows, d) with last stride 1, without a copy where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(out, what was normalised, mean, rstd); the first two shaped as x. Without bias it is RMSNorm, and mean is None.
    New tensors are no views: autograd forbids an in-place op on a view that a Function made."""
    kernels = backend.implementation("layer_norm", x.device)
    rows, out = rows_of(x), x.new_empty(x.shape)
    stream, normalised = ResidualStream(), x
    if residual is not None:
        normalised = x.new_empty(x.shape)
        stream = ResidualStream(rows_of(residual), normalised.view(rows.shape))
    _, mean, rstd = kernels.forward(rows, weight, bias, eps, stream, out=out.view(rows.shape))
    return out, normalised, mean, rstd


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, dsummed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias); dbias is None where mean is (RMSNorm)."""
    kernels = backend.implementation("layer_norm", x.device)
    rows, dx = rows_of(x), x.new_empty(x.shape)
    residual_grad = None if dsummed is None else rows_of(dsummed)
    _, dweight, dbias = kernels.backward(
        rows_of(dout), rows, weight, mean, rstd, residual_grad=residual_grad, dx=dx.view(rows.shape)
    )
    return dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out, _, mean, rstd = forward(x, weight, bias, eps, None)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, mean, rstd = ctx.saved_tensors
        run = _backward_op if dispatch.backward_by_library("layer_norm", dout) else backward
        return *run(dout, x, weight, mean, rstd, None), None


class _LayerNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        out, summed, mean, rstd = forward(x, weight, bias, eps, residual)
        ctx.save_for_backward(summed, weight, mean, rstd)
        return out, summed

    @staticmethod
    def backward(ctx, dout, dsummed):
        summed, weight, mean, rstd = ctx.saved_tensors
        run = _backward_op if dispatch.backward_by_library("layer_norm", dout, dsummed) else backward
        dx, dweight, dbias = run(dout, summed, weight, mean, rstd, dsummed)
        return dx, dx, dweight, dbias, None


@torch.library.custom_op("phi_fast::layer_norm", mutates_args=())
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, x + residual or nothing, mean, rstd)."""
    out, summed, *statistics = forward(x, weight, bias, eps, residual)
    mean, rstd = backend.unshared(statistics)  # type: ignore[arg-type]  # there is a bias, so there is a mean
    return out, x.new_empty(0) if residual is None else summed, mean, rstd


@_forward_op.register_fake
def _(x, weight, bias, eps, residual):
    statistics = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), statistics, statistics.clone()


@torch.library.custom_op("phi_fast::layer_norm_backward", mutates_args=())
def _backward_op(
    dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dsummed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = backward(dout, x, weight, mean, rstd, dsummed)
    dx, dweight, dbias = backend.unshared(gradients)  # type: ignore[arg-type]
    return dx, dweight, dbias


@_backward_op.register_fake
def _(dout, x, weight, mean, rstd, dsummed):
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, _, _, residual = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(x if residual is None else summed, weight, mean, rstd)
    ctx.sums = residual is not None


def _op_backward(ctx, dout, dsummed, dmean, drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(dout, x, weight, mean, rstd, dsummed if ctx.sums else None)
    return dx, dweight, dbias, None, dx if ctx.sums else None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
dispatch.once("layer_norm", _backward_op)


def check(x: Tensor, vectors: dict[str, Tensor], residual: Tensor | None) -> None:
    """Raise where x, residual or a vector over the last dim has a shape, dtype or device that does not fit."""
    if x.dim() < 1:
        raise ValueError("x is a scalar; expected (..., d)")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., d) with d of at least 1")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float16, bfloat16, float32 or float64")
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected ({x.shape[-1]},), x's last dim")
        if vector.dtype not in _DTYPES:
            raise TypeError(f"{name} is {vector.dtype}; expected float16, bfloat16, float32 or float64")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}; expected the same")
    if residual is not None and residual.dtype not in _DTYPES:
        raise TypeError(f"residual is {residual.dtype}; expected float16, bfloat16, float32 or float64")
    for name, tensor in (*vectors.items(), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}; move them to one device")

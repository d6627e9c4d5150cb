"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) by layer_norm's kernels, without mean and bias."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import autocast, dispatch
from .layer_norm import backward, check, forward


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) * weight over the last dim.

    x (..., d); weight (d,) or None. Dtypes, strides, autocast and residual are as `layer_norm`'s. Everything is
    computed in fp32 and rounded once, where transformers' RMSNorms round before the product with weight too. The
    kernels are layer_norm's: `use(..., op="layer_norm")` chooses them.

    The backward is deterministic. A second derivative is refused (NotImplementedError).
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype, each naming the value.
    """
    by_library = dispatch.by_library("rms_norm", x=x, weight=weight, residual=residual)
    weight = x.new_ones(x.shape[-1:]) if weight is None else weight
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_cuda and autocast.active(x) else x.dtype
    check(x, {"weight": weight}, residual)
    carried = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = functools.reduce(torch.promote_types, (weight.dtype, carried), dtype)
    weight, residual = weight.to(wide), None if residual is None else residual.to(wide)
    if wide != x.dtype:
        out = rms_norm(x.to(wide), weight, eps, residual=residual)
        return out.to(dtype) if isinstance(out, Tensor) else (out[0].to(dtype), out[1].to(carried))
    if by_library:
        out, summed, _ = _forward_op(x, weight, eps, residual)
    elif residual is None:
        return _RMSNorm.apply(x, weight, eps)
    else:
        out, summed = _RMSNormOfSum.apply(x, residual, weight, eps)
    return out if residual is None else (out, summed)


def _backward(dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsummed: Tensor | None) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = backward(dout, x, weight, None, rstd, dsummed)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, _, _, rstd = forward(x, weight, None, eps, None)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, rstd = ctx.saved_tensors
        run = _backward_op if dispatch.backward_by_library("rms_norm", dout) else _backward
        return *run(dout, x, weight, rstd, None), None


class _RMSNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        out, summed, _, rstd = forward(x, weight, None, eps, residual)
        ctx.save_for_backward(summed, weight, rstd)
        return out, summed

    @staticmethod
    def backward(ctx, dout, dsummed):
        summed, weight, rstd = ctx.saved_tensors
        run = _backward_op if dispatch.backward_by_library("rms_norm", dout, dsummed) else _backward
        dx, dweight = run(dout, summed, weight, rstd, dsummed)
        return dx, dx, dweight, None


@torch.library.custom_op("phi_fast::rms_norm", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, x + residual or nothing, rstd)."""
    out, summed, _, rstd = forward(x, weight, None, eps, residual)
    return out, x.new_empty(0) if residual is None else summed, rstd.clone()  # rstd is a view of both statistics


@_forward_op.register_fake
def _(x, weight, eps, residual):
    rstd = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), rstd


@torch.library.custom_op("phi_fast::rms_norm_backward", mutates_args=())
def _backward_op(
    dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsummed: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx, dweight = _backward(dout, x, weight, rstd, dsummed)
    return dx, dweight.clone()


@_backward_op.register_fake
def _(dout, x, weight, rstd, dsummed):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, summed, rstd = output
    ctx.save_for_backward(x if residual is None else summed, weight, rstd)
    ctx.sums = residual is not None


def _op_backward(ctx, dout, dsummed, drstd):
    dx, dweight = _backward_op(dout, *ctx.saved_tensors, dsummed if ctx.sums else None)
    return dx, dweight, None, dx if ctx.sums else None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
dispatch.once("rms_norm", _backward_op)

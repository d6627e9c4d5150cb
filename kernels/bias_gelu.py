"""gelu(x + bias): Hendrycks and Gimpel, arXiv 1606.08415, in GPT-2's tanh form or the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, backend, dispatch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias), in one pass each way.

    x (..., n); bias (n,) in x's dtype, or None: fp16, bf16, fp32 or fp64 (Triton: not fp64). Rows at any stride;
    where x cannot be viewed as (rows, n) with last stride 1 it is copied. approximate: "tanh" (phi's "gelu_new"), or
    "none" for the form with erf. fp32 arithmetic, rounded once. Only x and bias are saved for backward.

    Under torch.autocast bias is cast to x's dtype, as F.linear casts its own.
    The backward is deterministic: the bias's gradient is added up in a fixed order. A second derivative is refused
    (NotImplementedError).
    Raises ValueError for a shape, device or `approximate` that does not fit, TypeError for a dtype.
    """
    by_library = dispatch.by_library("bias_gelu", x=x, bias=bias)
    if bias is not None and autocast.active(x):
        bias = bias.to(x.dtype)
    _check(x, bias, approximate)
    if by_library:
        return _forward_op(x, bias, approximate)
    return _BiasGelu.apply(x, bias, approximate)


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (rows, n) with last stride 1, without a copy where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    kernels = backend.implementation("bias_gelu", x.device)
    rows, out = _rows(x), x.new_empty(x.shape)
    kernels.forward(rows, bias, out=out.view(rows.shape), approximate=approximate)
    return out  # not a view: autograd forbids an in-place op on a view that a Function made


def _backward(dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    kernels = backend.implementation("bias_gelu", x.device)
    rows, dx = _rows(x), x.new_empty(x.shape)
    _, dbias = kernels.backward(_rows(dout), rows, bias, dx=dx.view(rows.shape), approximate=approximate)
    return dx, dbias.to(x.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate):
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _forward(x, bias, approximate)

    @staticmethod
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        backward = _backward_op if dispatch.backward_by_library("bias_gelu", dout) else _backward
        dx, dbias = backward(dout, x, bias, ctx.approximate)
        return dx, None if bias is None else dbias, None


@torch.library.custom_op("phi_fast::bias_gelu", mutates_args=())
def _forward_op(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return _forward(x, bias, approximate)


@_forward_op.register_fake
def _(x, bias, approximate):
    return x.new_empty(x.shape)


@torch.library.custom_op("phi_fast::bias_gelu_backward", mutates_args=())
def _backward_op(dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _backward(dout, x, bias, approximate)


@_backward_op.register_fake
def _(dout, x, bias, approximate):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1])


def _setup_context(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _op_backward(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = _backward_op(dout, x, bias, ctx.approximate)
    return dx, None if bias is None else dbias, None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
dispatch.once("bias_gelu", _backward_op)


def _check(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate={approximate!r}; expected 'tanh' or 'none'")
    if x.dim() < 1:
        raise ValueError("x is a scalar; expected (..., n)")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., n) with n of at least 1")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float16, bfloat16, float32 or float64")
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({x.shape[-1]},), x's last dim")
    if bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype} and x is {x.dtype}; cast them to one dtype")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device} and x is on {x.device}; move them to one device")

"""act(gate) · up, the middle of a gated MLP (Shazeer, arXiv 2002.05202): SwiGLU with SiLU, GeGLU with GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, backend, dispatch
from .layer_norm import rows_of
from .reference.gated_activation import ACTIVATIONS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gated_activation(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """act(gate) · up (..., n), in one pass each way.

    gate, up (..., n) of one shape and dtype: fp16, bf16, fp32 or fp64 (Triton: not fp64). Without `up`, gate is
    (..., 2n), a packed projection's gate and then its up (Phi-3's gate_up_proj): both halves are read where they lie,
    and both gradients are written into one tensor. Rows at any stride; what cannot be viewed as rows with last stride 1
    is copied. activation: "silu" (Llama's and Mistral's), or "gelu_tanh" (Gemma's). fp32 arithmetic, rounded once. Only
    gate and up are saved for backward.

    Under torch.autocast gate and up of different dtypes are cast to the wider one, as their product casts them.
    The backward is deterministic. A second derivative is refused (NotImplementedError).
    Raises ValueError for a shape, device or `activation` that does not fit, TypeError for a dtype.
    """
    by_library = dispatch.by_library("gated_activation", gate=gate, up=up)
    if up is not None and gate.dtype != up.dtype and autocast.active(gate):
        wide = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(wide), up.to(wide)
    _check(gate, up, activation)
    if by_library:
        return _forward_op(gate, up, activation)
    return _GatedActivation.apply(gate, up, activation)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2n) -> two views (rows, n)."""
    rows = rows_of(x)
    n = rows.shape[-1] // 2
    return rows[:, :n], rows[:, n:]


def _shape(gate: Tensor, up: Tensor | None) -> tuple[int, ...]:
    return gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)


def _forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    kernels = backend.implementation("gated_activation", gate.device)
    left, right = _halves(gate) if up is None else (rows_of(gate), rows_of(up))
    out = gate.new_empty(_shape(gate, up))
    kernels.forward(left, right, out=out.view(left.shape), activation=activation)
    return out  # not a view: autograd forbids an in-place op on a view that a Function made


def _backward(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; the second is empty where there is no up."""
    kernels = backend.implementation("gated_activation", gate.device)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)
    if up is None:
        operands, (left, right) = _halves(gate), _halves(dgate)
    else:
        operands = rows_of(gate), rows_of(up)
        left, right = (x.view(operands[0].shape) for x in (dgate, dup))
    kernels.backward(rows_of(dout), *operands, dgate=left, dup=right, activation=activation)
    return dgate, dup


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        backward = _backward_op if dispatch.backward_by_library("gated_activation", dout) else _backward
        dgate, dup = backward(dout, gate, up, ctx.activation)
        return dgate, None if up is None else dup, None


@torch.library.custom_op("phi_fast::gated_activation", mutates_args=())
def _forward_op(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return _forward(gate, up, activation)


@_forward_op.register_fake
def _(gate, up, activation):
    return gate.new_empty(_shape(gate, up))


@torch.library.custom_op("phi_fast::gated_activation_backward", mutates_args=())
def _backward_op(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return _backward(dout, gate, up, activation)


@_backward_op.register_fake
def _(dout, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _op_backward(ctx, dout):
    gate, up = ctx.saved_tensors
    dgate, dup = _backward_op(dout, gate, up, ctx.activation)
    return dgate, None if up is None else dup, None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
dispatch.once("gated_activation", _backward_op)


def _check(gate: Tensor, up: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; expected {' or '.join(map(repr, ACTIVATIONS))}")
    if gate.dtype not in _DTYPES:
        raise TypeError(f"gate is {gate.dtype}; expected float16, bfloat16, float32 or float64")
    if gate.dim() < 1 or gate.shape[-1] == 0:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; expected (..., n) with n of at least 1")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}; without up it holds both, (..., 2n), so its last dim must be even"
            )
        return
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {tuple(up.shape)}; expected {tuple(gate.shape)}, gate's")
    if up.dtype != gate.dtype:
        raise TypeError(f"up is {up.dtype} and gate is {gate.dtype}; cast them to one dtype")
    if up.device != gate.device:
        raise ValueError(f"up is on {up.device} and gate is on {gate.device}; move them to one device")

"""phi's transformer block as one autograd function: x + attention(h) + mlp(h) with one h = LayerNorm(x).

The parallel form is GPT-J's (Wang and Komatsuzaki, 2021). Because both branches read the same h and are added, their
products merge: one into a packed (tokens, 3d + m) buffer [q | k | v | u], one out of a (tokens, d + m) buffer [o | g]
that attention and GELU write side by side. 2 matrix products forward and 4 backward, where the usual layout has 6 and
12. The residual and the output biases are written where the last product is added up, by the LayerNorm's own pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autocast, backend, dispatch

RECOMPUTE = ("none", "norm_gelu", "all")
"""What backward computes again: nothing, LayerNorm's and GELU's outputs, or everything from x."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARAMETERS = (
    "norm_weight",
    "norm_bias",
    "in_weight",
    "in_bias",
    "out_weight",
    "out_bias_attention",
    "out_bias_mlp",
)


def parallel_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias_attention: Tensor,
    out_bias_mlp: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-5,
    recompute: str = "norm_gelu",
) -> Tensor:
    """x + W_o attention(h) + b_o + W_2 gelu(W_1 h + b_1) + b_2 with h = LayerNorm(x), causal, GELU in its tanh form.

    x                      (batch, sequence, d); d a multiple of num_heads
    norm_weight, norm_bias (d,)
    in_weight, in_bias     (3d + m, d), (3d + m,): rows are q, k, v, then the MLP's m
    out_weight             (d, d + m): columns are the attention's d, then the MLP's m
    out_bias_attention, out_bias_mlp  (d,): added both; their gradients are the same tensor's values
    cos, sin               (positions >= sequence, rotary_dim / 2) from `rotary_table`, half-split pairs
    One dtype but for cos and sin: fp16, bf16, fp32 or fp64 (Triton: not fp64). Returns (batch, sequence, d). Autocast
    has no effect inside.

    recompute: what is kept for backward, in numbers per token (beside O(heads) statistics): "none" keeps x, h,
    [q|k|v|u] and [o|g], 6d + 2m; "norm_gelu" x, [q|k|v|u] and o, 5d + m; "all" x alone, d, and runs the block's forward
    again but for its last product.

    Under torch.autocast the parameters are cast to x's dtype. The backward is deterministic where the matrix products
    are. Parameters that need no gradient cost no product. Raises ValueError for a shape, stride, device or option,
    TypeError for a dtype, NotImplementedError for a second derivative.
    """
    given = (norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias_attention, out_bias_mlp)
    named = dict(zip(_PARAMETERS, given, strict=True))
    by_library = dispatch.by_library("parallel_block", x=x, **named, cos=cos, sin=sin)
    parameters = tuple(p.to(x.dtype) for p in given) if autocast.active(x) else given
    _check(x, parameters, cos, sin, num_heads, recompute)
    # Ours rotates q and k as it reads them; the others are handed them already rotated, in place.
    rotary_inside = backend.name("attention", x.device) in ("triton", "cpp")
    options = _Options(num_heads, eps, recompute, rotary_inside)
    inputs = (x.contiguous(), *parameters, cos, sin)
    if by_library:
        return _forward_op(*inputs, *options)[0]
    recording = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _ParallelBlock.apply(options, *inputs) if recording else _forward(inputs, options, recording=False)[0]


class _Options(NamedTuple):
    num_heads: int
    eps: float
    recompute: str
    rotary_inside: bool
    """Attention rotates q and k while it reads them; the packed buffer keeps them unrotated."""


class _Activations(NamedTuple):
    """Everything between x and the last product. T = batch × sequence."""

    h: Tensor  # (T, d)
    mean: Tensor  # (T,)
    rstd: Tensor  # (T,)
    packed: Tensor  # (T, 3d + m): [q | k | v | u], q and k rotated unless attention does that itself
    mixed: Tensor  # (T, d + m): [o | g]
    lse: Tensor  # (batch, heads, sequence)


class _Heads:
    """Views of the packed buffers, by head."""

    def __init__(self, x: Tensor, num_heads: int) -> None:
        self.batch, self.sequence, self.d = x.shape
        self.heads = num_heads

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, 3d + m) -> q, k, v, each (batch, sequence, heads, head_dim)."""
        q, k, v = (self.columns(packed, i * self.d, 1) for i in range(3))
        return q, k, v

    def rotating(self, packed: Tensor) -> Tensor:
        """(T, 3d + m) -> q and k as one (batch, sequence, 2 heads, head_dim)."""
        return self.columns(packed, 0, 2)

    def columns(self, buffer: Tensor, start: int, blocks: int) -> Tensor:
        wide = buffer.view(self.batch, self.sequence, -1)[..., start : start + blocks * self.d]
        return wide.unflatten(-1, (blocks * self.heads, -1))


@autocast.off
def _activations(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    options: _Options,
    *,
    apart: bool = False,
    shift: Tensor | None = None,
    shifted: Tensor | None = None,
) -> tuple[_Activations, Tensor]:
    """(everything up to the last product, o); x + shift is written to `shifted` on the way.

    o (T, d) is a view of [o | g], which a view kept for backward would keep alive; or, `apart`, a tensor of its own,
    that the GELU kernel carries over into [o | g].
    """
    heads, d, device = _Heads(x, options.num_heads), x.shape[-1], x.device
    rows = x.view(-1, d)
    norm = backend.implementation("layer_norm", device)
    h, mean, rstd = norm.forward(rows, norm_weight, norm_bias, options.eps, shift=shift, shifted=shifted)
    packed = torch.addmm(in_bias, h, in_weight.T)
    if not options.rotary_inside:
        backend.implementation("rotary", device).rotate_(heads.rotating(packed), cos, sin, 0)
    mixed = packed.new_empty(rows.shape[0], packed.shape[1] - 2 * d)
    o = packed.new_empty(rows.shape) if apart else mixed[:, :d]
    _, lse = backend.implementation("attention", device).forward(
        *heads.split(packed), out=heads.columns(o, 0, 1), **_attention(x, cos, sin, options)
    )
    backend.implementation("bias_gelu", device).forward(
        packed[:, 3 * d :], None, out=mixed[:, d:], carry=(o, mixed[:, :d]) if apart else None
    )
    return _Activations(h, mean, rstd, packed, mixed, lse), o


def _attention(x: Tensor, cos: Tensor, sin: Tensor, options: _Options) -> dict:
    """The arguments that both of attention's passes take."""
    arguments = {"scale": (x.shape[-1] // options.num_heads) ** -0.5, "causal": True}
    return arguments | ({"cos": cos, "sin": sin} if options.rotary_inside else {})


def _forward(inputs: Sequence[Tensor], options: _Options, *, recording: bool = True) -> list[Tensor]:
    """[the block's output, then what `options.recompute` keeps where `recording`]. inputs: `parallel_block`'s ten."""
    x, norm_weight, norm_bias, in_weight, in_bias, out_weight, bias_attention, bias_mlp, cos, sin = inputs
    out = x.new_empty(x.shape)
    shifted = out.view(-1, x.shape[-1])
    kept, o = _activations(
        x,
        norm_weight,
        norm_bias,
        in_weight,
        in_bias,
        cos,
        sin,
        options,
        apart=recording and options.recompute == "norm_gelu",
        shift=bias_attention + bias_mlp,
        shifted=shifted,
    )
    shifted.addmm_(kept.mixed, out_weight.T)
    if options.recompute == "all" or not recording:
        return [out]
    if options.recompute == "none":
        return [out, *kept]
    return [out, kept.mean, kept.rstd, kept.packed, o, kept.lse]


@autocast.off
def _backward(
    dout: Tensor, saved: Sequence[Tensor], inputs: Sequence[Tensor], options: _Options, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and of the seven parameters, None where not `wanted`.

    saved: `_forward`'s tail. inputs: x, norm_weight, norm_bias, in_weight, in_bias, out_weight, cos, sin.
    """
    x, norm_weight, norm_bias, in_weight, in_bias, out_weight, cos, sin = inputs
    want_x, want_norm, want_in, want_in_bias = wanted[0], wanted[1] or wanted[2], wanted[3], wanted[4]
    want_out, want_out_bias = wanted[5], wanted[6] or wanted[7]
    heads, d, device = _Heads(x, options.num_heads), x.shape[-1], x.device
    rows, dy = x.view(-1, d), dout.reshape(-1, d).contiguous()
    norm, gelu, gradient = (backend.implementation(op, device) for op in ("layer_norm", "bias_gelu", "weight_gradient"))
    h: Tensor | None = None
    if options.recompute == "norm_gelu":
        mean, rstd, packed, o, lse = saved
    elif options.recompute == "none":
        h, mean, rstd, packed, mixed, lse = saved
        o = mixed[:, :d]
    else:
        (h, mean, rstd, packed, mixed, lse), o = _activations(
            x, norm_weight, norm_bias, in_weight, in_bias, cos, sin, options
        )

    # The two branches: [dO | dG] in, [dQ | dK | dV | dU] out. Once read, [dO | dG] makes room for [o | g].
    dmixed = torch.mm(dy, out_weight)
    dpacked = torch.empty_like(packed)
    dq, dk, dv = heads.split(dpacked)
    q, k, v = heads.split(packed)
    backend.implementation("attention", device).backward(
        heads.columns(dmixed, 0, 1),
        q,
        k,
        v,
        heads.columns(o, 0, 1),
        lse,
        dq=dq,
        dk=dk,
        dv=dv,
        **_attention(x, cos, sin, options),
    )
    if not options.rotary_inside:
        backend.implementation("rotary", device).rotate_(heads.rotating(dpacked), cos, sin, 0, inverse=True)
    again = options.recompute == "norm_gelu" and want_out
    _, du_sum = gelu.backward(
        dmixed[:, d:],
        packed[:, 3 * d :],
        None,
        dx=dpacked[:, 3 * d :],
        activation=dmixed[:, d:] if again else None,
        carry=(o, dmixed[:, :d]) if again else None,
    )

    grads: list[Tensor | None] = [None] * 8
    if want_out:
        grads[5] = gradient.product(dy, dmixed if again else mixed)
    if want_out_bias:
        grads[6] = grads[7] = dy.sum(0)
    if want_in:
        h = norm.forward(rows, norm_weight, norm_bias, options.eps)[0] if h is None else h
        grads[3] = gradient.product(dpacked, h)
    if want_in_bias:
        grads[4] = torch.cat((dpacked[:, : 3 * d].sum(0), du_sum.to(in_bias.dtype)))
    if want_x or want_norm:
        dh = torch.mm(dpacked, in_weight)
        dx, dweight, dbias = norm.backward(dh, rows, norm_weight, mean, rstd, residual_grad=dy, dx=dh)
        grads[:3] = dx.view(x.shape), dweight.to(x.dtype), dbias.to(x.dtype)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


class _ParallelBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, *inputs):
        out, *saved = _forward(inputs, options)
        ctx.save_for_backward(*inputs[:6], *inputs[8:], *saved)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        kept = ctx.saved_tensors  # once: under activation checkpointing a second look finds nothing
        inputs, saved, wanted = kept[:8], kept[8:], ctx.needs_input_grad[1:9]
        if dispatch.backward_by_library("parallel_block", dout):
            return None, *_backward_by_library(dout, saved, inputs, ctx.options, wanted), None, None
        return None, *_backward(dout, saved, inputs, ctx.options, wanted), None, None


# Under torch.compile the graph holds one opaque op per block each way.
@torch.library.custom_op("phi_fast::parallel_block", mutates_args=())
def _forward_op(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias_attention: Tensor,
    out_bias_mlp: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    recompute: str,
    rotary_inside: bool,
) -> list[Tensor]:
    inner = (norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias_attention, out_bias_mlp)
    return backend.unshared(_forward((x, *inner, cos, sin), _Options(num_heads, eps, recompute, rotary_inside)))


@_forward_op.register_fake
def _(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, b_o, b_m, cos, sin, heads, eps, recompute, inside):
    batch, sequence, d = x.shape
    tokens, width = batch * sequence, in_weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(tokens, dtype=wide) for _ in range(2))
    packed, lse = x.new_empty(tokens, width), x.new_empty(batch, heads, sequence, dtype=wide)
    out = x.new_empty(x.shape)
    if recompute == "all":
        return [out]
    if recompute == "none":
        return [out, x.new_empty(tokens, d), mean, rstd, packed, x.new_empty(tokens, width - 2 * d), lse]
    return [out, mean, rstd, packed, x.new_empty(tokens, d), lse]


@torch.library.custom_op("phi_fast::parallel_block_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    saved: list[Tensor],
    inputs: list[Tensor],
    num_heads: int,
    eps: float,
    recompute: str,
    rotary_inside: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """`_backward`, with only the gradients that are wanted."""
    options = _Options(num_heads, eps, recompute, rotary_inside)
    grads = _backward(dout, saved, inputs, options, wanted)
    return backend.unshared(grad for grad in grads if grad is not None)


@_backward_op.register_fake
def _(dout, saved, inputs, num_heads, eps, recompute, rotary_inside, wanted):
    like = [*inputs[:6], inputs[1], inputs[1]]
    return [t.new_empty(t.shape) for t, want in zip(like, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *inputs[8:10], *output[1:])
    ctx.options = inputs[10:]


def _op_backward(ctx, grads):
    kept = ctx.saved_tensors
    inputs, saved = kept[:8], kept[8:]
    found = _backward_by_library(grads[0], saved, inputs, ctx.options, ctx.needs_input_grad[:8])
    return *found, None, None, None, None, None, None


def _backward_by_library(
    dout: Tensor, saved: Sequence[Tensor], inputs: Sequence[Tensor], options: Sequence, wanted: Sequence[bool]
) -> list[Tensor | None]:
    found = iter(_backward_op(dout, list(saved), list(inputs), *options, list(wanted)))
    return [next(found) if want else None for want in wanted]


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
dispatch.once("parallel_block", _backward_op)


def _check(x: Tensor, parameters: tuple[Tensor, ...], cos: Tensor, sin: Tensor, num_heads: int, recompute: str) -> None:
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}; expected one of {', '.join(map(repr, RECOMPUTE))}")
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, sequence, d)")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float16, bfloat16, float32 or float64")
    d = x.shape[2]
    if num_heads < 1 or d % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide x's last dim {d}")
    width = parameters[2].shape[0]  # 3d + m
    if width <= 3 * d:
        raise ValueError(f"in_weight has {width} rows; expected 3d + m with d = {d} and an MLP width m of at least 1")
    shapes = ((d,), (d,), (width, d), (width,), (d, width - 2 * d), (d,), (d,))
    for name, tensor, shape in zip(_PARAMETERS, parameters, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} (d = {d}, m = {width - 3 * d})")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}; cast them to one dtype")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected it contiguous, call .contiguous() on it")
    for name, tensor in (*zip(_PARAMETERS, parameters, strict=True), ("cos", cos), ("sin", sin)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}; move them to one device")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape or 2 * table.shape[1] > d // num_heads:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; expected (positions, rotary_dim / 2), both alike, with "
                f"rotary_dim at most head_dim {d // num_heads}"
            )
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {table.dtype}; expected float32, as rotary_table makes it")
        if table.shape[0] < x.shape[1]:
            raise ValueError(
                f"{name} has {table.shape[0]} positions for a sequence of {x.shape[1]}; make a longer table"
            )

"""The two passes of `parallel_block` on packed buffers: what is computed, kept, and computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autocast, backend
from .parallel_block_adapters import IN, NONE, OUT, Adapters
from .reference.attention import AttentionOptions
from .reference.layer_norm import UNTOUCHED, ResidualStream


class Inputs(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias_attention: Tensor
    out_bias_mlp: Tensor
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor | None

    def kept(self) -> tuple[Tensor | None, ...]:
        """What the backward reads: all but the output's biases."""
        return (*self[:6], *self[8:])

    @staticmethod
    def of_kept(kept: Sequence[Tensor | None]) -> Inputs:
        """`kept()`, with the biases' places left empty."""
        return Inputs(*kept[:6], None, None, *kept[6:])  # type: ignore[call-arg, arg-type]


class Options(NamedTuple):
    num_heads: int
    eps: float
    recompute: str
    rotary_inside: bool
    """Attention rotates q and k while it reads them; the packed buffer keeps them unrotated."""


class Activations(NamedTuple):
    """Everything between x and the last product. T = batch × sequence."""

    h: Tensor  # (T, d)
    mean: Tensor  # (T,)
    rstd: Tensor  # (T,)
    packed: Tensor  # (T, 3d + m): [q | k | v | u], q and k rotated unless attention does that itself
    mixed: Tensor  # (T, d + m): [o | g]
    lse: Tensor  # (batch, heads, sequence)


class Heads:
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


def _activations(
    inputs: Inputs,
    options: Options,
    *,
    apart: bool = False,
    stream: ResidualStream = UNTOUCHED,
    adapters: Adapters = NONE,
) -> tuple[Activations, Tensor]:
    """(everything up to the last product, o); x + stream.shift is written to `stream.shifted` on the way.

    o (T, d) is a view of [o | g], which a view kept for backward would keep alive; or, `apart`, a tensor of its own,
    that the GELU kernel carries over into [o | g].
    """
    x = inputs.x
    heads, d, device = Heads(x, options.num_heads), x.shape[-1], x.device
    rows = x.view(-1, d)
    norm = backend.implementation("layer_norm", device)
    h, mean, rstd = norm.forward(rows, inputs.norm_weight, inputs.norm_bias, options.eps, stream)
    packed = torch.addmm(inputs.in_bias, h, inputs.in_weight.T)
    adapters.add_to_packed_(packed, h)
    if not options.rotary_inside:
        backend.implementation("rotary", device).rotate_(heads.rotating(packed), inputs.cos, inputs.sin, 0)
    mixed = packed.new_empty(rows.shape[0], packed.shape[1] - 2 * d)
    o = packed.new_empty(rows.shape) if apart else mixed[:, :d]
    (q, k, v), attention = heads.split(packed), _attention(inputs, options)
    _, lse = backend.attention_for(q, k, attention).forward(q, k, v, attention, out=heads.columns(o, 0, 1))
    backend.implementation("bias_gelu", device).forward(
        packed[:, 3 * d :], None, out=mixed[:, d:], carry=(o, mixed[:, :d]) if apart else None
    )
    return Activations(h, mean, rstd, packed, mixed, lse), o


def _attention(inputs: Inputs, options: Options) -> AttentionOptions:
    scale = (inputs.x.shape[-1] // options.num_heads) ** -0.5
    tables = (inputs.cos, inputs.sin) if options.rotary_inside else ()
    return AttentionOptions(scale, True, None, inputs.cu_seqlens, *tables)


@autocast.off
def forward(inputs: Inputs, options: Options, *, recording: bool = True, adapters: Adapters = NONE) -> list[Tensor]:
    """[the block's output, then what `options.recompute` keeps where `recording`]."""
    x = inputs.x
    out = x.new_empty(x.shape)
    shifted = out.view(-1, x.shape[-1])
    apart = recording and options.recompute == "norm_gelu"
    stream = ResidualStream(shift=inputs.out_bias_attention + inputs.out_bias_mlp, shifted=shifted)
    kept, o = _activations(inputs, options, apart=apart, stream=stream, adapters=adapters)
    shifted.addmm_(kept.mixed, inputs.out_weight.T)
    adapters.add_to_output_(shifted, kept.mixed)
    if options.recompute == "all" or not recording:
        return [out]
    if options.recompute == "none":
        return [out, *kept]
    return [out, kept.mean, kept.rstd, kept.packed, o, kept.lse]


@autocast.off
def backward(
    dout: Tensor,
    saved: Sequence[Tensor],
    inputs: Inputs,
    options: Options,
    wanted: Sequence[bool],
    adapters: Adapters = NONE,
) -> list[Tensor | None]:
    """Gradients of x and of the seven parameters, None where not `wanted`, and of all A and B of `adapters`.

    saved: `forward`'s tail.
    """
    x = inputs.x
    want_x, want_norm, want_in, want_in_bias = wanted[0], wanted[1] or wanted[2], wanted[3], wanted[4]
    want_out, want_out_bias = wanted[5], wanted[6] or wanted[7]
    heads, d, device = Heads(x, options.num_heads), x.shape[-1], x.device
    rows, dy = x.view(-1, d), dout.reshape(-1, d).contiguous()
    norm, gelu, gradient = (backend.implementation(op, device) for op in ("layer_norm", "bias_gelu", "weight_gradient"))
    h: Tensor | None = None
    if options.recompute == "norm_gelu":
        mean, rstd, packed, o, lse = saved
    elif options.recompute == "none":
        h, mean, rstd, packed, mixed, lse = saved
        o = mixed[:, :d]
    else:
        (h, mean, rstd, packed, mixed, lse), o = _activations(inputs, options, adapters=adapters)

    # The two branches: [dO | dG] in, [dQ | dK | dV | dU] out. Once read, [dO | dG] makes room for [o | g].
    dmixed = torch.mm(dy, inputs.out_weight)
    narrowed = adapters.narrowed(OUT, dy, d)
    adapters.add_to_gradients_(OUT, dmixed, narrowed, d)
    dpacked = torch.empty_like(packed)
    dq, dk, dv = heads.split(dpacked)
    (q, k, v), attention = heads.split(packed), _attention(inputs, options)
    backend.attention_for(q, k, attention).backward(
        heads.columns(dmixed, 0, 1), q, k, v, heads.columns(o, 0, 1), lse, attention, dq=dq, dk=dk, dv=dv
    )
    if not options.rotary_inside:
        backend.implementation("rotary", device).rotate_(
            heads.rotating(dpacked), inputs.cos, inputs.sin, 0, inverse=True
        )
    again = options.recompute == "norm_gelu" and (want_out or adapters.has(OUT))
    _, du_sum = gelu.backward(
        dmixed[:, d:],
        packed[:, 3 * d :],
        None,
        dx=dpacked[:, 3 * d :],
        activation=dmixed[:, d:] if again else None,
        carry=(o, dmixed[:, :d]) if again else None,
    )
    if options.recompute == "norm_gelu":
        mixed = dmixed  # [o | g] where `again`; else nothing below reads it

    grads: list[Tensor | None] = [None] * 8
    if want_out:
        grads[5] = gradient.product(dy, mixed)
    if want_out_bias:
        grads[6] = grads[7] = dy.sum(0)
    if want_in or adapters.has(IN):
        h = norm.forward(rows, inputs.norm_weight, inputs.norm_bias, options.eps)[0] if h is None else h
    if want_in:
        grads[3] = gradient.product(dpacked, h)
    narrowed |= adapters.narrowed(IN, dpacked, d)
    of_adapters = adapters.gradients(h, mixed, dpacked, dy, narrowed, gradient.product)
    if want_in_bias:
        grads[4] = torch.cat((dpacked[:, : 3 * d].sum(0), du_sum.to(x.dtype)))
    if want_x or want_norm:
        dh = torch.mm(dpacked, inputs.in_weight)
        adapters.add_to_gradients_(IN, dh, narrowed, d)
        dx, dweight, dbias = norm.backward(dh, rows, inputs.norm_weight, mean, rstd, residual_grad=dy, dx=dh)
        grads[:3] = dx.view(x.shape), dweight.to(x.dtype), dbias.to(x.dtype)
    return [*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *of_adapters]

"""phi's transformer block as one autograd function: x + attention(h) + mlp(h) with one h = LayerNorm(x).

The parallel form is GPT-J's (Wang and Komatsuzaki, 2021). Because both branches read the same h and are added, their
products merge: one into a packed (tokens, 3d + m) buffer [q | k | v | u], one out of a (tokens, d + m) buffer [o | g]
that attention and GELU write side by side. 2 matrix products forward and 4 backward, where the usual layout has 6 and
12. The residual and the output biases are written where the last product is added up, by the LayerNorm's own pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import autocast, backend, dispatch, parallel_block_adapters
from .attention import check_documents
from .parallel_block_adapters import NONE, Adapters
from .parallel_block_passes import Inputs, Options, backward, forward

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
    cu_seqlens: Tensor | None = None,
    adapters: Adapters | None = None,
) -> Tensor:
    """x + W_o attention(h) + b_o + W_2 gelu(W_1 h + b_1) + b_2 with h = LayerNorm(x), causal, GELU in its tanh form.

    x                      (batch, sequence, d); d a multiple of num_heads
    norm_weight, norm_bias (d,)
    in_weight, in_bias     (3d + m, d), (3d + m,): rows are q, k, v, then the MLP's m
    out_weight             (d, d + m): columns are the attention's d, then the MLP's m
    out_bias_attention, out_bias_mlp  (d,): added both; their gradients are the same tensor's values
    cos, sin               (positions >= sequence, rotary_dim / 2) from `rotary_table`, half-split pairs
    cu_seqlens             (documents + 1,) int32 with batch 1, as in `attention`: no document sees another
    adapters               low-rank changes of the weights (LoRA); see `parallel_block_adapters`
    One dtype but for cos, sin, cu_seqlens: fp16, bf16, fp32 or fp64 (Triton: not fp64). Returns (batch, sequence, d).
    Autocast has no effect inside.

    recompute: what is kept for backward, in numbers per token (beside O(heads) statistics): "none" keeps x, h,
    [q|k|v|u] and [o|g], 6d + 2m; "norm_gelu" x, [q|k|v|u] and o, 5d + m; "all" x alone, d, and runs the block's forward
    again but for its last product.

    Under torch.autocast the parameters are cast to x's dtype. The backward is deterministic where the matrix products
    are. Parameters that need no gradient cost no product. Raises ValueError for a shape, stride, device or option,
    TypeError for a dtype, NotImplementedError for a second derivative, and for adapters where torch must see the block
    as one op (torch.compile, torch.func, FakeTensorMode).
    """
    given = (norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias_attention, out_bias_mlp)
    named = dict(zip(_PARAMETERS, given, strict=True))
    more = {} if adapters is None else {"adapters.a": adapters.a, "adapters.b": adapters.b}
    by_library = dispatch.by_library("parallel_block", x=x, **named, cos=cos, sin=sin, cu_seqlens=cu_seqlens, **more)
    parameters = tuple(p.to(x.dtype) for p in given) if autocast.active(x) else given
    _check(x, parameters, cos, sin, num_heads, recompute)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, x)
    options = Options(num_heads, eps, recompute, backend.rotary_inside(x.device))
    inputs = Inputs(x.contiguous(), *parameters, cos, sin, cu_seqlens)  # type: ignore[call-arg]
    adapters = NONE if adapters is None else _checked(adapters, inputs, by_library)
    if by_library:
        return _forward_op(*inputs, *options)[0]
    tensors = (*adapters.a, *adapters.b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs[:8], *tensors)):
        return _ParallelBlock.apply(options, adapters.parts, adapters.scale, *inputs, *tensors)
    return forward(inputs, options, recording=False, adapters=adapters)[0]


def _checked(adapters: Adapters, inputs: Inputs, by_library: bool) -> Adapters:
    """Cast adapters where autocast is on. Raises for those that do not fit, and where torch must see the block as one
    op."""
    x = inputs.x
    if autocast.active(x):
        a, b = (tuple(t.to(x.dtype) for t in tensors) for tensors in (adapters.a, adapters.b))
        adapters = adapters._replace(a=a, b=b)
    parallel_block_adapters.check(adapters, x, inputs.in_weight.shape[0])
    if by_library:
        raise NotImplementedError(
            "parallel_block: adapters under torch.compile, torch.func or FakeTensorMode; call it outside, or add "
            "them to the weights and leave them out"
        )
    return adapters


class _ParallelBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, parts, scale, *tensors):
        inputs, of_adapters = Inputs(*tensors[:11]), tensors[11:]
        out, *saved = forward(inputs, options, adapters=Adapters.of(parts, scale, of_adapters))
        ctx.save_for_backward(*inputs.kept(), *of_adapters, *saved)
        ctx.options, ctx.parts, ctx.scale = options, parts, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        # Read once: under activation checkpointing a second look finds nothing.
        kept, end = ctx.saved_tensors, 9 + 2 * len(ctx.parts)
        inputs, saved, wanted = Inputs.of_kept(kept[:9]), kept[end:], ctx.needs_input_grad[3:11]
        if not dispatch.backward_by_library("parallel_block", dout):
            adapters = Adapters.of(ctx.parts, ctx.scale, kept[9:end])
            gradients = backward(dout, saved, inputs, ctx.options, wanted, adapters)
        elif ctx.parts:
            raise NotImplementedError("parallel_block with adapters can be differentiated once, by plain tensors")
        else:
            gradients = backward_by_library(dout, saved, inputs, ctx.options, wanted)
        return None, None, None, *gradients[:8], None, None, None, *gradients[8:]


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
    cu_seqlens: Tensor | None,
    num_heads: int,
    eps: float,
    recompute: str,
    rotary_inside: bool,
) -> list[Tensor]:
    parameters = (norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias_attention, out_bias_mlp)
    inputs = Inputs(x, *parameters, cos, sin, cu_seqlens)
    return backend.unshared(forward(inputs, Options(num_heads, eps, recompute, rotary_inside)))


@_forward_op.register_fake
def _(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, b_o, b_m, cos, sin, cu, heads, eps, recompute, inside):
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
    cu_seqlens: Tensor | None,
    num_heads: int,
    eps: float,
    recompute: str,
    rotary_inside: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """`_backward`, with only the gradients that are wanted."""
    options = Options(num_heads, eps, recompute, rotary_inside)
    grads = backward(dout, saved, Inputs.of_kept((*inputs, cu_seqlens)), options, wanted)
    return backend.unshared(grad for grad in grads if grad is not None)


@_backward_op.register_fake
def _(dout, saved, inputs, cu_seqlens, num_heads, eps, recompute, rotary_inside, wanted):
    like = [*inputs[:6], inputs[1], inputs[1]]
    return [t.new_empty(t.shape) for t, want in zip(like, wanted, strict=True) if want]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*Inputs(*inputs[:11]).kept(), *output[1:])
    ctx.options = Options(*inputs[11:])


def _op_backward(ctx, grads):
    kept = ctx.saved_tensors
    inputs, wanted = Inputs.of_kept(kept[:9]), ctx.needs_input_grad[:8]
    return *backward_by_library(grads[0], kept[9:], inputs, ctx.options, wanted), *[None] * 7


def backward_by_library(
    dout: Tensor, saved: Sequence[Tensor], inputs: Inputs, options: Options, wanted: Sequence[bool]
) -> list[Tensor | None]:
    *kept, cu_seqlens = inputs.kept()
    found = iter(_backward_op(dout, list(saved), kept, cu_seqlens, *options, list(wanted)))
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

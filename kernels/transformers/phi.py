"""Phi's decoder layer as `parallel_block`: the model keeps its separate projections, and each pass merges them.

Merging copies the layer's weights: 0.3% of a bf16 step of phi-tiny at 2048 tokens on one CPU thread. It is done once
more in the backward pass, so that no merged copy lives from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, dispatch
from ..parallel_block import backward_by_library, parallel_block
from ..parallel_block_passes import Inputs, Options
from ..parallel_block_passes import backward as backward_pass
from ..parallel_block_passes import forward as forward_pass
from . import layers
from .attention import half, heads_fit, interface, table
from .masks import CAUSAL, window
from .modules import Forward, hooked, original, plain

RULES = (
    "parallel_block: with a mask or a KV cache, positions that differ by row, dropout, autocast, LoRA or hooks "
    "inside the layer, or in Triton with a head_dim other than 64, 80, 96 and 128 or a rotary_dim that is no power of "
    "two: then its LayerNorm, MLP and attention run on their own ops",
)

_INWARD, _INWARD_BIAS, _OUTWARD = slice(3, 7), slice(7, 11), slice(11, 13)
"""Where `_MergedBlock` has the weights of q, k, v and fc1, their biases, and the weights of dense and fc2."""


def why_no_block(module: Any) -> str | None:
    """Why `parallel_block` can never take the layer's place."""
    if module.self_attn.qk_layernorm:
        return "LayerNorm between projection and rotary embedding (qk_layernorm)"
    if module.self_attn.num_key_value_groups != 1:
        return "fewer key heads than query heads"
    config = module.self_attn.config
    if module.self_attn.head_dim * config.num_attention_heads != config.hidden_size:
        return f"{config.num_attention_heads} heads of {module.self_attn.head_dim} in a width of {config.hidden_size}"
    why = layers.why_no_gelu(module.mlp)
    exact = why is None and layers.approximate(module.mlp.activation_fn) != "tanh"
    return "GELU in its exact form; the block has the tanh form" if exact else why


def decoder_layer(base: type[nn.Module]) -> Forward:
    """PhiDecoderLayer's forward."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        if not _fits(self, hidden_states, attention_mask, position_embeddings, kwargs):
            arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
            return base.forward(self, hidden_states, **arguments)
        attention, mlp, norm = self.self_attn, self.mlp, self.input_layernorm
        inward, outward = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1), (attention.dense, mlp.fc2)
        cos, sin = (table(half(x)[0]) for x in position_embeddings)
        inputs = (
            hidden_states.contiguous(),
            norm.weight,
            norm.bias,
            *(linear.weight for linear in inward),
            *(linear.bias for linear in inward),
            *(linear.weight for linear in outward),
            *(linear.bias for linear in outward),
            cos,
            sin,
        )
        heads, eps = attention.config.num_attention_heads, norm.eps
        if dispatch.by_library("parallel_block", inputs=inputs) or not torch.is_grad_enabled():
            return parallel_block(*_merged(inputs)[:10], num_heads=heads, eps=eps)
        options = Options(heads, eps, "norm_gelu", backend.rotary_inside(hidden_states.device))
        return _MergedBlock.apply(options, *inputs)

    return forward


def _merged(inputs: tuple[Tensor, ...]) -> Inputs:
    """`parallel_block`'s tensors: (3d + m, d) weight of q, k, v and fc1, (d, d + m) weight of dense and fc2."""
    inward, outward = torch.cat(inputs[_INWARD]), torch.cat(inputs[_OUTWARD], 1)
    inward_bias = torch.cat(inputs[_INWARD_BIAS])
    bias_attention, bias_mlp, cos, sin = inputs[13:]
    return Inputs(*inputs[:3], inward, inward_bias, outward, bias_attention, bias_mlp, cos, sin, None)  # type: ignore[call-arg]


class _MergedBlock(torch.autograd.Function):
    """Merges the weights, runs parallel_block's two passes, and splits the weights' gradients."""

    @staticmethod
    def forward(ctx, options, *inputs):
        out, *saved = forward_pass(_merged(inputs), options)
        ctx.save_for_backward(*inputs, *saved)
        ctx.options, ctx.count = options, len(inputs)
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors
        inputs, saved, wanted = tensors[: ctx.count], tensors[ctx.count :], ctx.needs_input_grad[1:]
        merged = _merged(inputs)
        groups = (wanted[_INWARD], wanted[_INWARD_BIAS], wanted[_OUTWARD])
        asked = (*wanted[:3], *map(any, groups), *wanted[13:15])
        backward = backward_by_library if dispatch.backward_by_library("parallel_block", dout) else backward_pass
        grads = backward(dout, saved, merged, ctx.options, asked)
        parted = (
            *_parts(grads[3], inputs[_INWARD], 0),
            *_parts(grads[4], inputs[_INWARD_BIAS], 0),
            *_parts(grads[5], inputs[_OUTWARD], 1),
        )
        return None, *grads[:3], *parted, *grads[6:], None, None


def _parts(grad: Tensor | None, like: Sequence[Tensor], dim: int) -> Sequence[Tensor | None]:
    return [None] * len(like) if grad is None else grad.split([x.shape[dim] for x in like], dim)


def _fits(
    self: Any,
    x: Tensor,
    mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor] | None,
    kwargs: dict[str, Any],
) -> bool:
    attention, mlp = self.self_attn, self.mlp
    if any(original(module).__module__ != original(self).__module__ for module in (attention, mlp)):
        return False  # another module has been put in its place
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.dense, mlp.fc1, mlp.fc2)
    return (
        interface(attention.config, original(self))[1]
        and window(attention, mask) == CAUSAL
        and kwargs.get("past_key_values") is None
        and position_embeddings is not None
        and position_embeddings[0].shape[0] == 1
        and heads_fit(x.device, attention.head_dim, position_embeddings[0].shape[-1])
        and not kwargs.get("output_attentions")
        and kwargs.get("is_causal") in (None, True)
        and not (self.training and (self.resid_dropout.p or attention.attention_dropout))
        and not torch.is_autocast_enabled(x.device.type)
        and all(plain(linear) and linear.weight.dtype == x.dtype for linear in linears)
        and plain(self.input_layernorm, nn.LayerNorm)
        and self.input_layernorm.weight.dtype == x.dtype
        and not hooked(attention, mlp, mlp.activation_fn, self.resid_dropout)
    )

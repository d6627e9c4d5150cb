"""Phi's decoder layer as `parallel_block`: the model keeps its separate projections, each call merges them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..parallel_block import parallel_block
from . import layers
from .attention import half, table
from .modules import Forward, hooked, plain

RULES = (
    "parallel_block: with a mask or a KV cache, positions that differ by row, dropout, autocast, LoRA or hooks "
    "inside the layer: then its LayerNorm, MLP and attention run on their own ops",
)


def why_no_block(module: Any) -> str | None:
    """Why `parallel_block` can never take the layer's place."""
    if module.self_attn.qk_layernorm:
        return "LayerNorm between projection and rotary embedding (qk_layernorm)"
    if module.self_attn.num_key_value_groups != 1:
        return "fewer key heads than query heads"
    why = layers.why_no_gelu(module.mlp)
    exact = why is None and layers.approximate(module.mlp.activation_fn) != "tanh"
    return "GELU in its exact form; the block has the tanh form" if exact else why


def decoder_layer(base: type[nn.Module]) -> Forward:
    """PhiDecoderLayer's forward."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        if not _fits(self, hidden_states, attention_mask, position_embeddings, kwargs):
            arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
            return base.forward(self, hidden_states, **arguments)
        cos, sin = (table(half(x)[0]) for x in position_embeddings)
        attention = self.self_attn
        return parallel_block(
            hidden_states,
            self.input_layernorm.weight,
            self.input_layernorm.bias,
            *_merged(self),
            attention.dense.bias,
            self.mlp.fc2.bias,
            cos,
            sin,
            num_heads=attention.config.num_attention_heads,
            eps=self.input_layernorm.eps,
        )

    return forward


def _merged(self: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(3d + m, d) weight of q, k, v and fc1; their (3d + m,) bias; (d, d + m) weight of dense and fc2. Copies: a
    thousandth of the products' work at 2048 tokens, and the parameters stay where the optimizer knows them."""
    attention, mlp = self.self_attn, self.mlp
    inward = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1)
    weight, bias = (torch.cat([getattr(linear, name) for linear in inward]) for name in ("weight", "bias"))
    return weight, bias, torch.cat((attention.dense.weight, mlp.fc2.weight), 1)


def _fits(
    self: Any,
    x: Tensor,
    mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor] | None,
    kwargs: dict[str, Any],
) -> bool:
    attention, mlp = self.self_attn, self.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.dense, mlp.fc1, mlp.fc2)
    return (
        mask is None
        and kwargs.get("past_key_values") is None
        and position_embeddings is not None
        and position_embeddings[0].shape[0] == 1
        and not kwargs.get("output_attentions")
        and kwargs.get("is_causal") in (None, True)
        and not (self.training and (self.resid_dropout.p or attention.attention_dropout))
        and not torch.is_autocast_enabled(x.device.type)
        and all(plain(linear) and linear.weight.dtype == x.dtype for linear in linears)
        and plain(self.input_layernorm, nn.LayerNorm)
        and self.input_layernorm.weight.dtype == x.dtype
        and not hooked(attention, mlp, mlp.activation_fn, self.resid_dropout)
    )

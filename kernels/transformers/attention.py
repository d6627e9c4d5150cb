"""Rotary embedding and attention in place of transformers' own.

Attention goes in through transformers' registry: the model's config names "phi_fast_sdpa" or "phi_fast_eager", and each
call that this library's op cannot take is handed to the implementation that the model had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import backend
from ..attention import attention
from ..rotary import apply_rotary_
from ..triton.attention_tiles import HEAD_DIMS
from .modules import Builder, Forward, hooked, original

PREFIX = "phi_fast_"
IMPLEMENTATIONS = ("sdpa", "eager")
"""transformers' attention implementations that this library's can stand before."""

RULES = (
    "attention: where there is a mask (padding, packed or sliding window), where queries and keys differ in number "
    "(a step with a KV cache), with attention dropout, where attentions are asked for, or in Triton with a head_dim "
    "other than 64 and 128",
)


def register() -> None:
    """Make "phi_fast_sdpa" and "phi_fast_eager" known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(f"{PREFIX}sdpa", _before_sdpa)
    AttentionMaskInterface.register(f"{PREFIX}sdpa", sdpa_mask)
    AttentionInterface.register(f"{PREFIX}eager", _before_eager)
    AttentionMaskInterface.register(f"{PREFIX}eager", _eager_mask_or_none)


def _eager_mask_or_none(*, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """eager's additive mask; None where it would be the causal one of a sequence on itself."""
    arguments = {"q_length": q_length, "kv_length": kv_length, **kwargs}
    return None if q_length == kv_length and sdpa_mask(**arguments) is None else eager_mask(**arguments)


def _before_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
    if _fits(module, query, key, value, mask, kwargs):
        return _attention(query, key, value, kwargs.get("scaling")), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


def _before_eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
    if _fits(module, query, key, value, mask, kwargs):
        return _attention(query, key, value, kwargs.get("scaling")), None
    eager = sys.modules[original(module).__module__].eager_attention_forward
    return eager(module, query, key, value, _causal(query) if mask is None else mask, **kwargs)


def _causal(query: Tensor) -> Tensor:
    """(1, 1, sequence, sequence), additive: what `_eager_mask_or_none` left out, which eager would not do by itself."""
    length = query.shape[2]
    lowest = torch.full((length, length), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return lowest.triu(1)[None, None]


def heads_fit(device: torch.device, head_dim: int, rotary_dim: int = 1) -> bool:
    """The attention in use takes heads of that size, and turns so many of their dims itself. Triton's is written for
    `HEAD_DIMS` and a rotary_dim that divides them; the others take any."""
    return backend.name("attention", device) != "triton" or (head_dim in HEAD_DIMS and head_dim % rotary_dim == 0)


def _fits(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Plain causal attention of a sequence on itself. A mask that is None says causal: see `sdpa_mask`."""
    return (
        mask is None
        and query.shape[2] == key.shape[2]
        and key.shape == value.shape
        and heads_fit(query.device, query.shape[-1])
        and not kwargs.get("dropout")
        and not any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
        and kwargs.get("is_causal", getattr(module, "is_causal", True)) in (True, None)
        and not kwargs.get("output_attentions")
        and not hooked(module)
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """(batch, heads, sequence, head_dim) as transformers has it -> (batch, sequence, heads, head_dim)."""
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
    q, k, v = (_last_stride_one(x.to(dtype)).transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, causal=True, scale=scale)


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> None:
    """q and k (batch, sequence, heads, head_dim) in place, by transformers' position embeddings.

    cos, sin (batch or 1, sequence, half the rotated dims), whatever positions, base and scaling they were made with.
    """
    positions = None
    if cos.shape[0] != 1:
        positions = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
    apply_rotary_(q, k, *(table(x.flatten(0, 1)) for x in (cos, sin)), positions=positions, interleaved=interleaved)


def half(x: Tensor) -> Tensor:
    """transformers' cos or sin without the repetition of its first half."""
    return x[..., : x.shape[-1] // 2]


def table(x: Tensor) -> Tensor:
    """(positions, rotary_dim / 2) of any dtype as the ops read it."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def with_rotary(
    project: Callable[..., tuple[Tensor, Tensor, Tensor]], out: str, cache: str = "past_key_values"
) -> Builder:
    """Builder of an attention module's forward.

    project(module, hidden) -> q, k, v (batch, sequence, heads, head_dim). out: the output projection's name. cache: the
    argument that holds the KV cache.
    """

    def build(base: type[nn.Module]) -> Forward:
        def forward(self, hidden_states, *args, position_embeddings=None, attention_mask=None, **kwargs):
            if args or position_embeddings is None:
                kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
                return base.forward(self, hidden_states, *args, **kwargs)
            past = kwargs.pop(cache, None)
            q, k, v = project(self, hidden_states)
            rotate(q, k, *(half(x) for x in position_embeddings))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if past is not None:
                k, v = past.update(k, v, self.layer_idx)
            eager = sys.modules[base.__module__].eager_attention_forward
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
            dropout = self.attention_dropout if self.training else 0.0
            mixed, weights = interface(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
            return getattr(self, out)(mixed.reshape(*hidden_states.shape[:-1], -1)), weights

        return forward

    return build


def separate(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_proj, k_proj, v_proj: Phi, StableLM, Llama, Qwen2."""
    q, k, v = (getattr(self, f"{name}_proj")(hidden).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
    return q, k, v


def packed(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv_proj with rows q, k, v: Phi-3."""
    heads, key_heads = self.config.num_attention_heads, self.num_key_value_heads
    rows = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
    return rows[:, :, :heads], rows[:, :, heads : heads + key_heads], rows[:, :, heads + key_heads :]


def packed_by_head(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query_key_value with rows q, k, v of the first head, of the second...: GPT-NeoX."""
    d = self.head_size
    rows = self.query_key_value(hidden).unflatten(-1, (-1, 3 * d))
    return rows[..., :d], rows[..., d : 2 * d], rows[..., 2 * d :]


def gptj(base: type[nn.Module]) -> Forward:
    """GPT-J's attention: interleaved rotary from the module's own table, and no registry to go through."""

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
        sin, cos = self.embed_positions.to(q.device)[position_ids].to(q.dtype).chunk(2, -1)
        rotate(q, k, cos, sin, interleaved=True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        looked_at = kwargs.get("output_attentions") or hooked(self.attn_dropout)
        options = {"dropout": self.attn_dropout.p if self.training else 0.0, "output_attentions": looked_at}
        if _fits(self, q, k, v, attention_mask, options):
            mixed, weights = _attention(q, k, v, 1 / self.scale_attn), None
        else:
            mixed, weights = self._attn(q, k, v, _causal(q) if attention_mask is None else attention_mask)
            mixed = mixed.transpose(1, 2)
        return self.resid_dropout(self.out_proj(mixed.flatten(-2))), weights

    return forward

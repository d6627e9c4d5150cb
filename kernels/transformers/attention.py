"""Rotary embedding and attention in place of transformers' own.

The replacement is made in the modules, never in the config, which models share and users read and set. In each call the
config names the attention to use, and a replaced module runs this library's op only if that is transformers' sdpa or
the model's eager attention, and the mask is exactly causal, or that and a sliding window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import backend
from ..attention import attention
from ..rotary import apply_rotary_
from ..triton.attention_tiles import HEAD_DIMS
from .masks import CAUSAL, window
from .modules import Builder, Forward, hooked

IMPLEMENTATIONS = ("sdpa", "eager")
"""transformers' attention implementations that this library's can stand before."""

RULES = (
    "attention: where there is a mask (padding, packed rows), where queries and keys differ in number "
    "(a step with a KV cache), with attention dropout, where attentions are asked for, or in Triton with a head_dim "
    "other than 64, 80, 96 and 128",
)


def interface(config: PreTrainedConfig, base: type[nn.Module]) -> tuple[Any, bool]:
    """Return the attention function that the config names at this moment, and whether this library's may replace it:
    only if it is transformers' sdpa or the model's own eager one, not one that somebody else registered."""
    eager, name = sys.modules[base.__module__].eager_attention_forward, config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name, eager if name == "eager" else None)
    return function, function is eager or function is sdpa_attention_forward


def heads_fit(device: torch.device, head_dim: int, rotary_dim: int = 1) -> bool:
    """Whether the attention in use takes heads of that size, and can rotate that many of their dims itself. Triton's is
    written for `HEAD_DIMS` and a rotary_dim that is a power of two; the others take any."""
    power = rotary_dim & (rotary_dim - 1) == 0
    return backend.name("attention", device) != "triton" or (head_dim in HEAD_DIMS and power)


def _fits(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Causal attention of a sequence on itself, through a window or not."""
    return (
        window(module, mask) is not None
        and query.shape[2] == key.shape[2]
        and key.shape == value.shape
        and heads_fit(query.device, query.shape[-1])
        and not kwargs.get("dropout")
        and not any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
        and kwargs.get("is_causal", getattr(module, "is_causal", True)) in (True, None)
        and not kwargs.get("output_attentions")
        and not hooked(module)
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, seen: tuple[int, int] | None) -> Tensor:
    """(batch, heads, sequence, head_dim) as transformers has it -> (batch, sequence, heads, head_dim)."""
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
    q, k, v = (_last_stride_one(x.to(dtype)).transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, causal=True, window=None if seen == CAUSAL else seen, scale=scale)


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
            interfaced, replaceable = interface(self.config, base)
            if args or position_embeddings is None or not replaceable:
                kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
                return base.forward(self, hidden_states, *args, **kwargs)
            past = kwargs.pop(cache, None)
            q, k, v = project(self, hidden_states)
            rotate(q, k, *(half(x) for x in position_embeddings))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if past is not None:
                k, v = past.update(k, v, self.layer_idx)
            dropout = self.attention_dropout if self.training else 0.0
            options = {"dropout": dropout, "scaling": self.scaling, **kwargs}
            if _fits(self, q, k, v, attention_mask, options):
                mixed, weights = _attention(q, k, v, self.scaling, window(self, attention_mask)), None
            else:
                mixed, weights = interfaced(self, q, k, v, attention_mask, **options)
            return getattr(self, out)(mixed.reshape(*hidden_states.shape[:-1], -1)), weights

        return forward

    return build


def separate(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_proj, k_proj, v_proj: Phi, StableLM, Llama, Qwen2."""
    q, k, v = (getattr(self, f"{name}_proj")(hidden).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
    if getattr(self, "qk_layernorm", False):  # heads before positions: StableLM has a norm per head
        q, k = (norm(x.transpose(1, 2)).transpose(1, 2) for norm, x in ((self.q_layernorm, q), (self.k_layernorm, k)))
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


def why_no_gptj(module: nn.Module) -> str | None:
    """GPT-J's module was written anew in transformers 5.24."""
    if hasattr(module, "embed_positions"):
        return None
    return (
        "this version of transformers gives GPT-J's attention its rotary table from outside: known are 5.23's modules"
    )


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
            mixed, weights = _attention(q, k, v, 1 / self.scale_attn, window(self, attention_mask)), None
        else:
            mixed, weights = self._attn(q, k, v, attention_mask)
            mixed = mixed.transpose(1, 2)
        return self.resid_dropout(self.out_proj(mixed.flatten(-2))), weights

    return forward

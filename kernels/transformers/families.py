"""Which modules of which models run on which ops: one table, read by `accelerate` and by the documentation's test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from . import attention, layers, loss, phi
from .modules import Builder


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a module."""

    build: Builder
    ops: str
    """The ops that run instead, for the report."""
    why_not: Callable[[nn.Module], str | None] = lambda module: None
    """A reason for leaving this very module, or None."""


@dataclass(frozen=True)
class Family:
    """A model of transformers, by the names of its classes."""

    name: str
    """transformers' model_type, which is also its folder."""
    replaced: Mapping[str, Replacement]
    left: Mapping[str, str]
    """Class -> why it stays."""

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def model(self) -> str:
        """The class of a causal language model, as users name it."""
        return next(name for name in self.replaced if name.endswith("ForCausalLM"))

    @property
    def base(self) -> str:
        """The class of the model without a head, which makes the masks."""
        return f"{self.model.removesuffix('ForCausalLM')}Model"


LAYER_NORM = Replacement(layers.layer_norm, "layer_norm", layers.why_no_layer_norm)
_LOSS = Replacement(loss.causal_lm, "linear_cross_entropy, when it trains with labels")
_ATTENTION = "apply_rotary_, attention"
_RMS = Replacement(layers.rms_norm, "rms_norm")
_GATED = Replacement(layers.gated_mlp, "gated_activation", layers.why_not_gated)
_PACKED_GATED = Replacement(layers.packed_gated_mlp, "gated_activation", layers.why_not_gated)


def _attention(project: Callable, out: str, cache: str = "past_key_values") -> Replacement:
    return Replacement(attention.with_rotary(project, out, cache), _ATTENTION)


def _mlp(up: str, down: str, activation: str, dropout: str | None = None) -> Replacement:
    return Replacement(layers.gelu_mlp(up, down, activation, dropout), "bias_gelu", layers.why_no_gelu)


def _llama(prefix: str, project: Callable = attention.separate) -> dict[str, Replacement]:
    """The replacements in Llama and the models that were written after it, whose classes begin with `prefix`."""
    return {
        f"{prefix}ForCausalLM": _LOSS,
        f"{prefix}Attention": _attention(project, "o_proj"),
        f"{prefix}MLP": _GATED,
        f"{prefix}RMSNorm": _RMS,
    }


def _with_head_norms(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_proj, k_proj and v_proj, with an RMSNorm over each head of q and k before the rotation: Qwen3."""
    q, k, v = attention.separate(self, hidden)
    return self.q_norm(q), self.k_norm(k), v


FAMILIES = (
    Family(
        "phi",
        {
            "PhiForCausalLM": _LOSS,
            "PhiDecoderLayer": Replacement(phi.decoder_layer, "parallel_block", phi.why_no_block),
            "PhiAttention": _attention(attention.separate, "dense"),
            "PhiMLP": _mlp("fc1", "fc2", "activation_fn"),
        },
        {},
    ),
    Family(
        "gpt_neox",
        {
            "GPTNeoXForCausalLM": _LOSS,
            "GPTNeoXAttention": _attention(attention.packed_by_head, "dense", "layer_past"),
            "GPTNeoXMLP": _mlp("dense_h_to_4h", "dense_4h_to_h", "act"),
        },
        {},
    ),
    Family(
        "gptj",
        {
            "GPTJForCausalLM": _LOSS,
            "GPTJAttention": Replacement(
                attention.gptj, "apply_rotary_ (interleaved), attention", attention.why_no_gptj
            ),
            "GPTJMLP": _mlp("fc_in", "fc_out", "act", "dropout"),
        },
        {},
    ),
    Family(
        "stablelm",
        {
            "StableLmForCausalLM": _LOSS,
            "StableLmAttention": _attention(attention.separate, "o_proj"),
            "StableLmMLP": _GATED,
        },
        {},
    ),
    Family(
        "phi3",
        {**_llama("Phi3", attention.packed), "Phi3MLP": _PACKED_GATED},
        {},
    ),
    Family("llama", _llama("Llama"), {}),
    Family("mistral", _llama("Mistral"), {}),
    Family("qwen2", _llama("Qwen2"), {}),
    Family("qwen3", _llama("Qwen3", _with_head_norms), {}),
)


def family_of(model: object) -> Family:
    """Raises TypeError for a model that is none of `FAMILIES`."""
    modules = {cls.__module__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if isinstance(model, PreTrainedModel) and family.module in modules:
            return family
    known = ", ".join(family.model for family in FAMILIES)
    raise TypeError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model that accelerate knows; expected one of "
        f"{known} (or another head on these models) from transformers. In other models call the ops themselves: "
        "docs/kernels.md"
    )

"""Which modules of which models run on which ops: one table, read by `accelerate` and by the documentation's test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
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
_GATED = "gated SiLU: no op for it here"
_RMS = Replacement(layers.rms_norm, "rms_norm")


def _attention(project: Callable, out: str, cache: str = "past_key_values") -> Replacement:
    return Replacement(attention.with_rotary(project, out, cache), _ATTENTION)


def _mlp(up: str, down: str, activation: str, dropout: str | None = None) -> Replacement:
    return Replacement(layers.gelu_mlp(up, down, activation, dropout), "bias_gelu", layers.why_no_gelu)


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
        {"StableLmForCausalLM": _LOSS, "StableLmAttention": _attention(attention.separate, "o_proj")},
        {"StableLmMLP": _GATED},
    ),
    Family(
        "phi3",
        {"Phi3ForCausalLM": _LOSS, "Phi3Attention": _attention(attention.packed, "o_proj"), "Phi3RMSNorm": _RMS},
        {"Phi3MLP": _GATED},
    ),
    Family(
        "llama",
        {"LlamaForCausalLM": _LOSS, "LlamaAttention": _attention(attention.separate, "o_proj"), "LlamaRMSNorm": _RMS},
        {"LlamaMLP": _GATED},
    ),
    Family(
        "qwen2",
        {"Qwen2ForCausalLM": _LOSS, "Qwen2Attention": _attention(attention.separate, "o_proj"), "Qwen2RMSNorm": _RMS},
        {"Qwen2MLP": _GATED},
    ),
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

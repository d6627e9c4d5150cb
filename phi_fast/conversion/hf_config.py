"""Converts config.json of the Hugging Face layouts to PhiConfig, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..config import MAX_CONTEXT, PhiConfig
from ..json_files import Fields
from .errors import ConversionError, ModelFileError

# phi-msft's and MixFormer's field names -> Hugging Face phi's.
_OLD_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "n_head_kv": "num_key_value_heads",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_MOST = {"max_position_embeddings": MAX_CONTEXT}


def read_config(raw: Fields) -> PhiConfig:
    """The model that a config.json in any of the three layouts describes.

    Raises ConversionError listing everything that phi_fast's phi does not support.
    """
    where = raw.where
    values = {_OLD_NAMES.get(name, name): value for name, value in raw.values.items() if value is not None}
    absent = [name for name in _SHAPE if name not in values]
    if absent:
        raise ConversionError(f"{where} does not give {', '.join(absent)}: is it a phi model's?")
    wrong = [f"{name} is {values[name]!r:.80}" for name in _SHAPE if not _is_count(values[name], name)]
    if wrong:
        most = ", ".join(f"{name} at most {most:,}" for name, most in _MOST.items())
        raise ConversionError(f"{where}: {', '.join(wrong)}; expected whole numbers of at least 1, {most}")
    fields = Fields(values, where, raw.way_out, raw.prefix, ModelFileError)
    # transformers 5's name, and transformers 4's
    rope_name = next((name for name in ("rope_parameters", "rope_scaling") if values.get(name)), "")
    rope = fields.inner(rope_name) if rope_name else Fields({}, where)
    problems = _unsupported(fields, rope)
    if problems:
        raise ConversionError(f"{where} describes a model other than phi_fast's phi:\n  " + "\n  ".join(problems))
    default = PhiConfig()
    try:
        return PhiConfig(
            **{name: values[name] for name in _SHAPE},
            rope_theta=_number(rope, "rope_theta", _number(fields, "rope_theta", default.rope_theta)),
            layer_norm_eps=_number(fields, "layer_norm_eps", default.layer_norm_eps),
            initializer_range=_number(fields, "initializer_range", default.initializer_range),
            bos_token_id=_token_id(fields, "bos_token_id"),
            eos_token_id=_token_id(fields, "eos_token_id"),
        )
    except ValueError as error:
        raise ConversionError(f"{where}: {error}") from error


def run_config(options: Fields) -> PhiConfig:
    """The model in a run's options. Raises ConversionError if this version does not know all of its fields."""
    model = options.inner("model")
    unknown = sorted(model.values.keys() - {field.name for field in dataclasses.fields(PhiConfig)})
    if unknown:
        raise ConversionError(
            f"{options.where}: this version does not know these fields of the run's model: {', '.join(unknown)}"
        )
    return read_config(model)


def _is_count(value: Any, name: str) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST.get(name, 2**31)


def _token_id(fields: Fields, name: str) -> int | None:
    """The id; None if it is missing, as in older configurations, or is not a single id: the tokenizer decides then."""
    return fields.whole(name, most=2**31) if isinstance(fields.values.get(name), int) else None


def _number(fields: Fields, name: str, default: float) -> float:
    return fields.number(name) if name in fields else default


def _unsupported(fields: Fields, rope: Fields) -> list[str]:
    values = fields.values
    d, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = d / heads
    factor = _number(rope, "partial_rotary_factor", _number(fields, "partial_rotary_factor", 0.5))
    expected: dict[str, tuple[Any, Any]] = {
        "head dim (hidden_size / num_attention_heads)": (head_dim, 64),
        "rotary dim": (_number(fields, "rotary_dim", factor * head_dim), 32),
        "intermediate_size": (values.get("intermediate_size", 4 * d), 4 * d),
        "num_key_value_heads": (values.get("num_key_value_heads", heads), heads),
        "hidden_act": (values.get("hidden_act", "gelu_new"), "gelu_new"),
        "qk_layernorm": (values.get("qk_layernorm", False), False),
        "tie_word_embeddings": (values.get("tie_word_embeddings", False), False),
        "rope type": (rope.values.get("rope_type", rope.values.get("type", "default")), "default"),
    }
    return [f"{name} is {found}, expected {wanted}" for name, (found, wanted) in expected.items() if found != wanted]


def phi_config(config: PhiConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for transformers' `phi`, readable by versions 4 (rope_theta) and 5 (rope_parameters)."""
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "gelu_new",
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
        },
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def old_config(config: PhiConfig, dtype: torch.dtype, *, mixformer: bool) -> dict[str, Any]:
    """config.json with the older layouts' names."""
    return {
        "architectures": ["MixFormerSequentialForCausalLM" if mixformer else "PhiForCausalLM"],
        "model_type": "mixformer-sequential" if mixformer else "phi-msft",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "n_inner": config.intermediate_size,
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }

"""config.json of the Hugging Face layouts <-> PhiConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..config import PhiConfig
from ..errors import UsageError


class ConversionError(UsageError):
    """A model that cannot be read or written; the message lists everything that is wrong."""


# phi-msft's and MixFormer's names for what Hugging Face's phi calls otherwise.
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
_OPTIONAL = ("layer_norm_eps", "initializer_range")


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ConversionError naming the file where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}. Get it again") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a JSON {type(value).__name__}, expected an object. Get it again")
    return value


def read_config(path: Path) -> PhiConfig:
    """A config.json of any of the three layouts. Raises ConversionError listing all that this model cannot express."""
    raw = read_json(path)
    values = {_OLD_NAMES.get(name, name): value for name, value in raw.items() if value is not None}
    absent = [name for name in _SHAPE if name not in values]
    if absent:
        raise ConversionError(f"{path} does not give {', '.join(absent)}: is it a phi model's?")
    wrong = [f"{name} is {values[name]!r}" for name in _SHAPE if not _is_count(values[name])]
    if wrong:
        raise ConversionError(f"{path}: {', '.join(wrong)}; expected whole numbers of at least 1")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # transformers 5's, and 4's
    problems = _unsupported(values, rope)
    if problems:
        raise ConversionError(f"{path} describes a model other than phi_fast's phi:\n  " + "\n  ".join(problems))
    fields = {name: values[name] for name in (*_SHAPE, *_OPTIONAL) if name in values}
    # Older configurations leave the special tokens out; transformers' own defaults (1 and 2) are not phi-1.5's.
    tokens = {name: values[name] for name in ("bos_token_id", "eos_token_id") if isinstance(values.get(name), int)}
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    return PhiConfig(**fields, **tokens, rope_theta=float(theta))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unsupported(values: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    d, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = d / heads
    factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 0.5))
    rotary_dim = values.get("rotary_dim", factor * head_dim)
    expected: dict[str, tuple[Any, Any]] = {
        "head dim (hidden_size / num_attention_heads)": (head_dim, 64),
        "rotary dim": (rotary_dim, 32),
        "intermediate_size": (values.get("intermediate_size", 4 * d), 4 * d),
        "num_key_value_heads": (values.get("num_key_value_heads", heads), heads),
        "hidden_act": (values.get("hidden_act", "gelu_new"), "gelu_new"),
        "qk_layernorm": (values.get("qk_layernorm", False), False),
        "tie_word_embeddings": (values.get("tie_word_embeddings", False), False),
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    return [f"{name} is {found}, expected {wanted}" for name, (found, wanted) in expected.items() if found != wanted]


def phi_config(config: PhiConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of transformers' `phi`, readable by its version 4 (rope_theta) and 5 (rope_parameters)."""
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

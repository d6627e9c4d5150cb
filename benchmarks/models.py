"""phi as transformers and litgpt build it from a PhiConfig, and the loss that each of them trains with."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PhiConfig as HuggingFaceConfig
from transformers import PhiForCausalLM

from phi_fast import PhiConfig
from phi_fast.conversion.hf_config import phi_config

Preset = Literal[
    *("phi-small", "phi-tiny", "small phi-small", "small phi-tiny"),
    *("a quarter of phi-1.5", "small a quarter of phi-1.5"),
]
"""A name that `of` knows; with "small " before it, the smaller model of the run that only tests the benchmark."""


def of(preset: str) -> PhiConfig:
    """The model of a preset's name, or six of phi-1.5's layers: several optimizers of those fit into one GPU."""
    if preset == "a quarter of phi-1.5":
        return PhiConfig.preset("phi-1.5").replace(num_hidden_layers=6)
    return PhiConfig.preset(preset)


def hugging_face(config: PhiConfig) -> nn.Module:
    """transformers' model, with attention by torch's SDPA."""
    fields = {name: value for name, value in phi_config(config, torch.float32).items() if name != "torch_dtype"}
    return PhiForCausalLM(HuggingFaceConfig(**fields | {"use_cache": False, "attn_implementation": "sdpa"})).train()


def litgpt_config(config: PhiConfig) -> Any:
    """litgpt's entry for phi-1.5, in the shape of `config`."""
    from litgpt.config import Config

    return Config.from_name(
        "phi-1_5",
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        intermediate_size=config.intermediate_size,
    )


def litgpt(config: PhiConfig) -> nn.Module:
    """litgpt's model."""
    from litgpt.model import GPT

    return GPT(litgpt_config(config))


def loss_of_hugging_face(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The loss as the model's own loss function computes it: cross entropy of fp32 logits."""
    logits = model(input_ids).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def loss_of_litgpt(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The loss as `litgpt pretrain` computes it."""
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy(model(input_ids), labels)


def data(config: PhiConfig, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Random (input_ids, labels), each (rows, the whole context)."""
    ids = torch.randint(config.vocab_size, (rows, config.max_position_embeddings + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def small(config: PhiConfig) -> PhiConfig:
    """The configuration that the small run of a benchmark trains instead of `config`."""
    return config.replace(num_hidden_layers=1, vocab_size=512, max_position_embeddings=64)

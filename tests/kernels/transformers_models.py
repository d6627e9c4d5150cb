"""Random-weight models of every family that `accelerate` knows, small enough to train in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 96
PAD = 0

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPTJ = {"n_embd": 64, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}

_TWO_HEADS = {"num_attention_heads": 2, "num_hidden_layers": 1}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# name -> (prefix of transformers' classes, differences from _SHAPE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("Phi", {}),
    "phi, grouped heads, q/k norm, exact GELU": (
        "Phi",
        {"num_key_value_heads": 2, "qk_layernorm": True, "hidden_act": "gelu"},
    ),
    "phi, wide heads": ("Phi", {"head_dim": 32}),
    "phi-2's heads": (
        "Phi",
        {**_TWO_HEADS, "hidden_size": 160, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.4}},
    ),
    "gpt-neox": ("GPTNeoX", {"hidden_dropout": 0.0}),
    "gpt-neox, sequential, tanh GELU": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt-j": ("GPTJ", {**_GPTJ, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "stablelm": ("StableLm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm, q/k norm": ("StableLm", {"num_key_value_heads": 2, "qk_layernorm": True}),
    "phi-3": ("Phi3", {"num_key_value_heads": 2}),
    "phi-3-mini's heads": ("Phi3", {**_TWO_HEADS, "hidden_size": 192}),
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama, eager": ("Llama", {"attn_implementation": "eager"}),
    "llama, tanh GELU": ("Llama", {"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, sliding window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
}
FAMILIES = ("phi", "gpt-neox", "gpt-j", "stablelm", "phi-3", "llama", "mistral", "qwen2", "qwen3")


def build(name: str, dtype: torch.dtype = torch.float32, head: str = "ForCausalLM", **changes: Any) -> PreTrainedModel:
    """The model in training mode, with the same weights every time; biases and norms are not at initial values."""
    prefix, different = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**_SHAPE, **different, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}{head}")._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def tokens(rows: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    """Token ids (rows, length), int64, without padding."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, seed: int = 1, length: int = 17) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of three rows, two of which are padded on that side."""
    ids, mask = tokens(3, length, seed), torch.ones(3, length, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 9)):
        hidden = slice(length - padding, length) if side == "right" else slice(0, padding)
        mask[row, hidden] = 0
    ids = ids.where(mask == 1, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def gradients(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """ "loss" and the gradient of every parameter that has one, by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def exact_gradients(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """`gradients` of a model in float64. transformers' own loss rounds logits to fp32, so the loss is computed here."""
    model.zero_grad()
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "num_items_in_batch")}
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    labels, items = batch["labels"][:, 1:].flatten(), batch.get("num_items_in_batch")
    loss = nn.functional.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
    loss = loss if items is None else loss / items
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def pooled(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins several batches: a single loss, or a bias's gradient near 0, is too small a sample to judge."""
    every = list(found)
    return {name: torch.stack([each[name] for each in every]) for name in every[0]}

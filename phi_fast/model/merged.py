"""Converts between Hugging Face phi's state dict and the merged one of `phi_fast.Phi`: pure functions on dicts.

In a merged layer the rows of in_proj are q, k, v, fc1, and the columns of out_proj are dense, fc2. The two output
biases stay separate: they have the same gradient, but checkpoints and the optimizer need both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Merged name -> (Hugging Face's names, the dim they are joined along).
LAYER: dict[str, tuple[tuple[str, ...], int]] = {
    "norm.weight": (("input_layernorm.weight",), 0),
    "norm.bias": (("input_layernorm.bias",), 0),
    "in_proj.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "mlp.fc1.weight"),
        0,
    ),
    "in_proj.bias": (("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "mlp.fc1.bias"), 0),
    "out_proj.weight": (("self_attn.dense.weight", "mlp.fc2.weight"), 1),
    "out_proj.bias_attention": (("self_attn.dense.bias",), 0),
    "out_proj.bias_mlp": (("mlp.fc2.bias",), 0),
}
OUTSIDE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.final_layernorm.weight",
    "final_norm.bias": "model.final_layernorm.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
SHARES = {"in_proj.weight": (1, 1, 1, 4), "in_proj.bias": (1, 1, 1, 4), "out_proj.weight": (1, 4)}
"""Widths of the joined parts, in units of hidden_size."""


def parts_of(ours: str, whole: Tensor) -> tuple[Tensor, ...]:
    """Split a merged tensor, named as in `LAYER`, into views of the parts that it joins."""
    shares, dim = SHARES.get(ours, (1,)), LAYER[ours][1]
    unit = whole.shape[dim] // sum(shares)
    return whole.split([share * unit for share in shares], dim)


def to_merged(split: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert Hugging Face phi's state dict to `Phi`'s. Joined tensors are copies, the others are shared with `split`.

    Keys that hold no parameter (`*.rotary_emb.*`) are ignored. Raises KeyError for a missing or unknown key.
    """
    left = {name: tensor for name, tensor in split.items() if ".rotary_emb." not in name}
    merged = {ours: _take(left, theirs) for ours, theirs in OUTSIDE.items()}
    for i in range(_layers(split, "model.layers.")):
        for ours, (names, dim) in LAYER.items():
            parts = [_take(left, f"model.layers.{i}.{name}") for name in names]
            merged[f"layers.{i}.{ours}"] = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    _refuse(left)
    return merged


def to_split(merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert `Phi`'s state dict (or its gradients, under the same names) to Hugging Face phi's.

    The results are views of the merged tensors. Raises KeyError for a missing or unknown key.
    """
    left = dict(merged)
    split = {theirs: _take(left, ours) for ours, theirs in OUTSIDE.items()}
    for i in range(_layers(merged, "layers.")):
        for ours, (names, _) in LAYER.items():
            parts = parts_of(ours, _take(left, f"layers.{i}.{ours}"))
            split |= {f"model.layers.{i}.{name}": part for name, part in zip(names, parts, strict=True)}
    _refuse(left)
    return split


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=-1)


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    if name not in left:
        raise KeyError(f"the state dict has no {name!r}")
    return left.pop(name)


def _refuse(left: Mapping[str, Tensor]) -> None:
    if left:
        raise KeyError(f"the state dict has keys that phi does not have: {', '.join(sorted(left)[:8])}")

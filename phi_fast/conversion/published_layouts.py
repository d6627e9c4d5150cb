"""Four layouts of one model: Hugging Face `phi`, phi-msft, MixFormer, and this project's merged layout.

A layout is described by how its tensors are joined from Hugging Face's, which are the smallest parts. So each layout
can be built from any other, one tensor at a time and bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..config import PhiConfig
from ..model.merged import LAYER, OUTSIDE


@dataclass(frozen=True)
class Joined:
    """A tensor of a layout: Hugging Face tensors joined along `dim`."""

    parts: tuple[str, ...]
    dim: int = 0


@dataclass(frozen=True)
class Piece:
    """Place of a Hugging Face tensor in a layout: elements start … start + length of `name` along `dim`."""

    name: str
    dim: int
    start: int
    length: int


Layout = dict[str, Joined]
NAMES = ("hf", "phi-msft", "mixformer", "merged")

_PARAMETERS = ("weight", "bias")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Module of a block in phi-msft and MixFormer -> Hugging Face's modules.
_OLD_BLOCK = {
    "ln": ("input_layernorm",),
    "mixer.Wqkv": _QKV,
    "mixer.out_proj": ("self_attn.dense",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
# A key that only this layout has.
_SIGNATURES = {
    "hf": "model.embed_tokens.weight",
    "phi-msft": "transformer.embd.wte.weight",
    "mixformer": "layers.0.wte.weight",
    "merged": "embed_tokens.weight",
}


def shapes(config: PhiConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the Hugging Face layout, in the layout's order."""
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,),
        **dict.fromkeys((*_QKV, "self_attn.dense"), (d, d)),
        "mlp.fc1": (inner, d),
        "mlp.fc2": (d, inner),
    }
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(config.num_hidden_layers):
        for module, shape in block.items():
            result[f"model.layers.{i}.{module}.weight"] = shape
            result[f"model.layers.{i}.{module}.bias"] = shape[:1]
    result |= {"model.final_layernorm.weight": (d,), "model.final_layernorm.bias": (d,)}
    return result | {"lm_head.weight": (vocab, d), "lm_head.bias": (vocab,)}


def layout(name: str, config: PhiConfig) -> Layout:
    """The layout of that name. Raises ValueError for another name."""
    if name == "hf":
        return {key: Joined((key,)) for key in shapes(config)}
    if name == "merged":
        return _merged(config)
    if name in ("phi-msft", "mixformer"):
        return _old(config, mixformer=name == "mixformer")
    raise ValueError(f"layout {name!r} is not one of {', '.join(map(repr, NAMES))}")


def detect(keys: Iterable[str]) -> str | None:
    """The layout that has these keys, or None."""
    there = set(keys)
    return next((name for name, signature in _SIGNATURES.items() if signature in there), None)


def count_layers(name: str, keys: Iterable[str]) -> int:
    """Number of layers among the keys of a layout."""
    before = {"hf": "model.layers.", "phi-msft": "transformer.h.", "mixformer": "layers.", "merged": "layers."}[name]
    numbers = {key[len(before) :].partition(".")[0] for key in keys if key.startswith(before)}
    outside = {"0"} if name == "mixformer" else set()  # its embedding; the head is one more
    return max(0, len(numbers - outside) - (name == "mixformer"))


def joined_shape(joined: Joined, of: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a tensor in a layout; `of`: the Hugging Face shapes."""
    first = of[joined.parts[0]]
    length = sum(of[part][joined.dim] for part in joined.parts)
    return (*first[: joined.dim], length, *first[joined.dim + 1 :])


def pieces(table: Layout, of: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    """The place in `table` of each Hugging Face tensor; `of`: the Hugging Face shapes."""
    found = {}
    for name, joined in table.items():
        start = 0
        for part in joined.parts:
            length = of[part][joined.dim]
            found[part] = Piece(name, joined.dim, start, length)
            start += length
    return found


def _merged(config: PhiConfig) -> Layout:
    table = {ours: Joined((theirs,)) for ours, theirs in OUTSIDE.items()}
    for i in range(config.num_hidden_layers):
        for ours, (names, dim) in LAYER.items():
            table[f"layers.{i}.{ours}"] = Joined(tuple(f"model.layers.{i}.{name}" for name in names), dim)
    return table


def _old(config: PhiConfig, *, mixformer: bool) -> Layout:
    """phi-msft has `transformer.h.{i}` and `lm_head`; MixFormer one list: embedding 0, blocks 1…L, head L+1."""
    last = config.num_hidden_layers + 1
    embedding, head = ("layers.0.wte", f"layers.{last}") if mixformer else ("transformer.embd.wte", "lm_head")
    table = {f"{embedding}.weight": Joined(("model.embed_tokens.weight",))}
    for i in range(config.num_hidden_layers):
        block = f"layers.{i + 1}" if mixformer else f"transformer.h.{i}"
        for module, theirs in _OLD_BLOCK.items():
            for parameter in _PARAMETERS:
                parts = tuple(f"model.layers.{i}.{name}.{parameter}" for name in theirs)
                table[f"{block}.{module}.{parameter}"] = Joined(parts)
    for module, name in (("ln", "model.final_layernorm"), ("linear", "lm_head")):
        for parameter in _PARAMETERS:
            table[f"{head}.{module}.{parameter}"] = Joined((f"{name}.{parameter}",))
    return table

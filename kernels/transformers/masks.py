"""Masks that say of themselves which keys they show, so that attention need not look at their values.

Where every token may be seen, transformers gives sdpa no mask for plain causal attention, but a tensor for a sliding
window, and to eager attention a tensor always. These tensors are made here instead, with an attribute, and handed to
the model's own forward, which takes masks of four dims as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import find_packed_sequence_indices

from .modules import Forward

CAUSAL = (-1, -1)
"""`attention`'s window of a mask that is causal and no more."""

_WINDOW = "_phi_fast_window"
"""Attribute of a mask made here: `attention`'s window, beside causality."""


def masks(base: type[nn.Module]) -> Forward:
    """Build a base model's forward that makes the masks whose window its layers are to know."""
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    def forward(self, *args, **kwargs):
        arguments = dict(zip(names[: len(args)], args[: len(names)], strict=True)) | kwargs
        if len(args) <= len(names):
            made = _made(self, **arguments)
            if made is not None:
                return base.forward(self, **{**arguments, "attention_mask": made})
        return base.forward(self, *args, **kwargs)

    return forward


def window(module: Any, mask: Tensor | None) -> tuple[int, int] | None:
    """Return the window that `attention` needs to show a causal row the keys that the mask shows; None for any other
    mask, or one not made here. No mask means causal to sdpa, but not to eager attention."""
    if mask is None:
        return CAUSAL if module.config._attn_implementation == "sdpa" and _is_causal(module.config) else None
    return getattr(mask, _WINDOW, None)


def _made(
    self: Any,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor | dict[str, Tensor | None] | None:
    """The mask of all layers, or that of each type of layer, where every token may be seen; None where the model is to
    make its own."""
    config, x = self.config, input_ids if inputs_embeds is None else inputs_embeds
    implementation = config._attn_implementation
    if not isinstance(x, Tensor) or implementation not in ("eager", "sdpa") or not _is_causal(config):
        return None
    length, slides = x.shape[1], getattr(config, "sliding_window", None)
    if slides is not None and slides < 1:
        return None  # no key at all
    if implementation == "sdpa" and (slides is None or length < slides):
        return None  # transformers makes none either
    if past_key_values is not None and (past_key_values.is_compileable or past_key_values.get_seq_length() != 0):
        return None  # room for later tokens, or earlier ones
    if attention_mask is not None and not _hides_nothing(attention_mask, length):
        return None
    looked_through = attention_mask is None and past_key_values is None and position_ids is not None
    if looked_through and find_packed_sequence_indices(position_ids) is not None:
        return None  # documents that see only themselves
    dtype = self.get_input_embeddings().weight.dtype if inputs_embeds is None else inputs_embeds.dtype
    additive = dtype if implementation == "eager" else None
    if not hasattr(self, "has_sliding_layers"):
        return _mask(length, slides, additive, x.device)
    # Qwen2 and Qwen3: some layers look through a window.
    every = None if implementation == "sdpa" else _mask(length, None, additive, x.device)
    sliding = _mask(length, slides, additive, x.device) if self.has_sliding_layers else None
    return {"full_attention": every, "sliding_attention": sliding}


def _mask(length: int, slides: int | None, additive: torch.dtype | None, device: torch.device) -> Tensor:
    """(1, 1, length, length): true where a row sees a key, or with `additive` 0 there and that dtype's minimum
    elsewhere. slides: the number of keys up to its own that a row sees; None for all."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    if slides is not None:
        seen = seen.triu(1 - slides)
    lowest = None if additive is None else torch.finfo(additive).min
    mask = seen if lowest is None else torch.zeros(seen.shape, dtype=additive, device=device).masked_fill(~seen, lowest)
    setattr(mask, _WINDOW, CAUSAL if slides is None else (slides - 1, -1))
    return mask


def _hides_nothing(mask: Any, length: int) -> bool:
    """True for (batch, length) of ones; False under a compiler, which does not see values."""
    two_dims = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length
    return two_dims and not torch.compiler.is_compiling() and bool(mask.all())


def _is_causal(config: PreTrainedConfig) -> bool:
    return getattr(config, "is_causal", True)

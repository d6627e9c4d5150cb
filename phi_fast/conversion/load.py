"""A `Phi` ready to run, from whatever `Source.open` finds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..errors import UsageError
from ..model.phi import Phi
from ..precision import DTYPES
from . import published_layouts
from .folder import find_tokenizer, token_ids
from .source import Source


def choose_device(name: str = "auto") -> torch.device:
    """ "auto": CUDA where torch sees a GPU, else the CPU; any other name is torch's. Raises UsageError for one that is
    not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}; expected auto, cpu, cuda or cuda:N") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": fp16 on CUDA, fp32 on a CPU (16-bit products are emulated on most). Raises UsageError."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load(
    name_or_path: str | Path | Source,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
) -> tuple[Phi, Tokenizer]:
    """A model and its tokenizer from a run, a checkpoint, a folder in any layout, the hub, or an opened `Source`.

    Weights are read a tensor at a time into place, so the peak is the model and its largest tensor. The ids in the
    model's config are the tokenizer's. Raises ConversionError as `Source.open`, `find_tokenizer` and `token_ids` do.
    """
    source = name_or_path if isinstance(name_or_path, Source) else Source.open(name_or_path)
    found = find_tokenizer(source, tokenizer)
    ids = token_ids(source, found, tokenizer)
    target = choose_device(device)
    with torch.device("meta"):
        model = Phi(source.config.replace(bos_token_id=ids.beginning, eos_token_id=ids.end))
    model = model.to(choose_dtype(dtype, target)).to_empty(device=target)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, joined in published_layouts.layout("merged", source.config).items():
            parameters[name].copy_(source.read_joined(joined))
    return model.eval(), found

"""Loads a `Phi`, ready to run, from anything that `Source.open` accepts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..errors import UsageError
from ..model.phi import Phi
from ..model.reference import ReferencePhi
from ..precision import DTYPES
from . import published_layouts
from .folder import find_tokenizer, token_ids
from .masters import use_average
from .source import Source


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name. "auto": CUDA if torch sees a GPU, else the CPU. Raises UsageError if it is unusable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}; expected auto, cpu, cuda or cuda:N") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name. "auto": fp16 on CUDA, fp32 on a CPU, since most CPUs emulate 16-bit products.

    Raises UsageError for an unknown name."""
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
    ema: bool = False,
) -> tuple[Phi, Tokenizer]:
    """Load a model and its tokenizer from a run, a checkpoint, a folder in any layout, the hub, or an opened `Source`.

    Weights are read into place one tensor at a time, so that peak memory is the model and its largest tensor. The ids
    in the model's config are the tokenizer's. ema: load the moving average of a run's weights. Raises ConversionError
    as `Source.open`, `find_tokenizer` and `token_ids` do.
    """
    source = name_or_path if isinstance(name_or_path, Source) else Source.open(name_or_path)
    if ema:
        use_average(source)
    found = find_tokenizer(source, tokenizer)
    ids = token_ids(source, found, tokenizer)
    target = choose_device(device)
    with torch.device("meta"):
        model = Phi(source.config.replace(bos_token_id=ids.beginning, eos_token_id=ids.end))
    model = model.to(choose_dtype(dtype, target)).to_empty(device=target)
    fill(model, source)
    return model.eval(), found


@torch.no_grad()
def fill(model: Phi | ReferencePhi, source: Source) -> None:
    """Read a source's weights into a model of its shape, one tensor at a time, rounded to the parameters' dtype."""
    parameters = dict(model.named_parameters())
    layout = "merged" if isinstance(model, Phi) else "hf"
    for name, joined in published_layouts.layout(layout, source.config).items():
        parameters[name].copy_(source.read_joined(joined))

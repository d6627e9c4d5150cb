"""`python -m phi_fast.convert SOURCE OUT`: a phi model from any of its layouts into another, a tensor at a time.

SOURCE is a run directory, one of its checkpoints, a folder in Hugging Face's, phi-msft's, MixFormer's or the merged
layout (safetensors, sharded or not; .bin for the older ones), or a name on the Hugging Face hub.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from .conversion import folder as beside
from .conversion import layout, writer
from .conversion.hf_config import ConversionError
from .conversion.source import Source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GIGABYTE = 10**9


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a phi model; the result of --to hf loads with AutoModelForCausalLM and AutoTokenizer as it is."""

    source: Annotated[str, tyro.conf.Positional]
    """A run directory, a checkpoint, a model folder, or OWNER/NAME on the Hugging Face hub."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; must not exist yet, unless --overwrite."""
    to: Literal["hf", "phi-msft", "mixformer", "merged"] = "hf"
    """Layout to write. hf: transformers' `phi`. merged: this project's own."""
    dtype: Literal["keep", "fp32", "fp16", "bf16"] = "keep"
    """Storage of the weights; keep: bit for bit as they are."""
    tokenizer: str | None = None
    """Tokenizer to write beside the weights (as in `prepare`). Default: the source's own."""
    max_shard_gb: float = 5.0
    """Largest weights file, in 10⁹ bytes; a larger model is sharded, with an index."""
    overwrite: bool = False
    """Replace OUT where it exists."""


def convert(options: ConvertOptions, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write `options.out`; it appears only when it is complete. `progress(tensors done, of)` is called along the way.

    Memory: the largest tensor and its copy, whatever the model's size. Raises ConversionError; OUT is then untouched.
    """
    if options.out.exists() and not options.overwrite:
        raise ConversionError(f"{options.out} exists; name another folder, or add --overwrite to replace it")
    if not 0 < options.max_shard_gb < math.inf:
        raise ConversionError(f"--max-shard-gb {options.max_shard_gb}: expected a size above 0")
    source = Source.open(options.source)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=options.out.parent, prefix=f".{options.out.name}."))
    try:
        _fill(aside / options.out.name, source, options, progress)
        if options.out.exists():
            options.out.rename(aside / "replaced")
        (aside / options.out.name).rename(options.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return options.out


def _fill(folder: Path, source: Source, options: ConvertOptions, progress: Callable[[int, int], None] | None) -> None:
    folder.mkdir()
    target = layout.layout(options.to, source.config)
    entries = []
    for name, joined in target.items():
        dtypes = {source.dtype(part) for part in joined.parts}
        if len(dtypes) > 1 and options.dtype == "keep":
            raise ConversionError(f"{name} would join {', '.join(map(str, dtypes))}: choose one with --dtype")
        dtype = DTYPES.get(options.dtype) or dtypes.pop()
        entries.append(writer.Entry(name, layout.joined_shape(joined, source.parts), dtype))
    dtype_of = {entry.name: entry.dtype for entry in entries}
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(entries))
        return source.read_joined(target[name]).to(dtype_of[name])

    beside.write_config(folder, options.to, source.config, entries[0].dtype)
    beside.write_tokenizer(folder, source, options.tokenizer)
    beside.write_model_card(folder, source, options.to)
    writer.write(folder, entries, read, int(options.max_shard_gb * GIGABYTE))


def main() -> int:
    options = tyro.cli(ConvertOptions, prog="python -m phi_fast.convert", config=(tyro.conf.AvoidSubcommands,))
    console = Console(stderr=True)
    try:
        with console.status("reading") as status:
            convert(options, lambda done, of: status.update(f"tensor {done} of {of}"))
    except (ConversionError, ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(f"wrote {options.out} ({options.to} layout)", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m phi_fast.convert SOURCE OUT`: convert a phi model from one layout to another, one tensor at a time; or,
with `--gguf FILE`, to one file for llama.cpp.

SOURCE is a run directory, one of its checkpoints, a folder in Hugging Face's, phi-msft's, MixFormer's or the merged
layout (safetensors, sharded or not; .bin for the older ones), or a name on the Hugging Face hub.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.convert", "PyTorch")

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.text import Text
from tokenizers import Tokenizer
from torch import Tensor

from .conversion import folder as beside
from .conversion import gguf_file, hub, model_card, published_layouts, target, writer
from .conversion.errors import ConversionError
from .conversion.masters import use_average, use_masters
from .conversion.source import Source
from .data import vocabulary
from .files import writing
from .precision import DTYPES
from .startup import tolerate_encodings
from .terminal import console, printable

GIGABYTE = 10**9


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a phi model; AutoModelForCausalLM and AutoTokenizer can load the result of --to hf directly."""

    source: Annotated[str, tyro.conf.Positional]
    """A run directory, a checkpoint, a model folder, or OWNER/NAME on the Hugging Face hub."""
    out: Annotated[Path | None, tyro.conf.Positional] = None
    """The folder to write; must not exist yet, unless --overwrite. May be left out with --gguf."""
    gguf: Path | None = None
    """GGUF file to write for llama.cpp, beside OUT or instead of it. Needs the extra `gguf`."""
    push: str | None = None
    """OWNER/NAME on the Hugging Face hub, to which OUT is uploaded in one commit; made if it does not exist. Needs a
    token: `hf auth login`, or HF_TOKEN."""
    private: bool = False
    """If --push makes a repository, only its owner sees it."""
    to: Literal["hf", "phi-msft", "mixformer", "merged"] = "hf"
    """Layout to write. hf: transformers' `phi`. merged: this project's own."""
    dtype: Literal["keep", "fp32", "fp16", "bf16"] = "keep"
    """dtype of the written weights; keep: unchanged, bit for bit. fp32 from a run that trained in 16 bits: the fp32
    master weights of its checkpoint. In a GGUF file biases and LayerNorms are always fp32."""
    ema: bool = False
    """Write the moving average of the weights, which a run with --ema-decay keeps in fp32, instead of the weights."""
    tokenizer: str | None = None
    """Tokenizer to write beside the weights (as in `prepare`). Default: the source's own."""
    max_shard_gb: float = 5.0
    """Largest weights file, in 10⁹ bytes; a larger model is sharded, with an index."""
    overwrite: bool = False
    """Replace OUT if it exists and holds only what an earlier `convert` wrote, and the file of --gguf if it exists."""


def convert(
    options: ConvertOptions,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `options.out` and `options.gguf`, which appear only when complete; returns the first that is set.
    Then upload the first, with `options.push`.

    progress(done, total) is called for each tensor; tell(line) is called for what was copied from the source, changed
    or left out. Memory: the largest tensor and its copy, whatever the model's size. Raises ConversionError, and
    UsageError if a result cannot be written; what was there is then untouched.
    """
    source = _open(options)
    if options.ema:
        use_average(source)
        tell("the moving average of the weights")
    elif options.dtype == "fp32" and any(source.dtype(part).itemsize == 2 for part in source.parts):
        kept = use_masters(source)
        tell("fp32 weights: " + ("the run's own, not its 16-bit weights" if kept else "the 16-bit weights, widened"))
    tokenizer = beside.find_tokenizer(source, options.tokenizer)
    ids = _token_ids(source, tokenizer, options, tell)
    if options.gguf is not None:
        with writing(options.gguf, "make room or grant write permission, or name another file"):
            chat = beside.chat_files(source, options.tokenizer)
            template = chat.template if chat else None
            gguf_file.write(options.gguf, source, tokenizer, ids, template, DTYPES.get(options.dtype), progress)
    if options.out is not None:
        out = options.out
        with writing(out, "make room or grant write permission, or name another folder"):
            target.write(out, lambda folder: _fill(folder, out, source, tokenizer, ids, options, progress, tell))
        if options.push is not None:
            tell(f"uploaded to {hub.push(out, options.push, private=options.private)}")
    return options.out or options.gguf  # type: ignore[return-value]  # _open demands one


def _open(options: ConvertOptions) -> Source:
    """Open the source, after checking what can be checked before it is downloaded or read."""
    if not 0 < options.max_shard_gb < math.inf:
        raise ConversionError(f"--max-shard-gb {options.max_shard_gb}: expected a size above 0")
    if options.out is None and options.gguf is None:
        raise ConversionError("name a folder to write, OUT, or a file, --gguf FILE")
    if options.push is not None:
        if options.out is None:
            raise ConversionError(f"--push {options.push} uploads a folder: name it, OUT")
        hub.check(options.push)
    if options.gguf is not None:
        gguf_file.check(options.gguf, options.out, overwrite=options.overwrite)
    if options.out is not None and options.out.exists() and not options.overwrite:
        target.check(options.out, (), overwrite=False)
    source = Source.open(options.source)
    read = [source.folder, *source.bases, *source.paths, *([source.run] if source.run else [])]
    if options.out is not None:
        target.check(options.out, read, overwrite=options.overwrite)
    if options.gguf is not None and options.gguf.resolve() in {path.resolve() for path in source.paths}:
        raise ConversionError(f"--gguf {options.gguf} is a file of the source: name another")
    return source


def _token_ids(
    source: Source, tokenizer: Tokenizer, options: ConvertOptions, tell: Callable[[str], None]
) -> vocabulary.TokenIds:
    ids = beside.token_ids(source, tokenizer, options.tokenizer)
    for field, mine, id in (
        ("bos_token_id", source.config.bos_token_id, ids.beginning),
        ("eos_token_id", source.config.eos_token_id, ids.end),
    ):
        if mine not in (None, id):
            tell(f"{field} is {id}, as the tokenizer has it; the source's configuration says {mine}")
    return ids


def _fill(
    folder: Path,
    out: Path,
    source: Source,
    tokenizer: Tokenizer,
    ids: vocabulary.TokenIds,
    options: ConvertOptions,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> None:
    table = published_layouts.layout(options.to, source.config)
    entries = []
    for name, joined in table.items():
        dtypes = {source.dtype(part) for part in joined.parts}
        if len(dtypes) > 1 and options.dtype == "keep":
            raise ConversionError(f"{name} would join {', '.join(map(str, dtypes))}: choose one with --dtype")
        dtype = DTYPES.get(options.dtype) or dtypes.pop()
        entries.append(writer.Entry(name, published_layouts.joined_shape(joined, source.parts), dtype))
    dtype_of = {entry.name: entry.dtype for entry in entries}
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(entries))
        return source.read_joined(table[name]).to(dtype_of[name])

    config = source.config.replace(bos_token_id=ids.beginning, eos_token_id=ids.end)
    beside.write_config(folder, options.to, config, entries[0].dtype, ids)
    for line in beside.write_tokenizer(folder, source, options.tokenizer, tokenizer, ids):
        tell(line)
    model_card.write(folder, source, options.to, options.push or out.absolute().name)
    writer.write(folder, entries, read, int(options.max_shard_gb * GIGABYTE))


def main() -> int:
    tolerate_encodings()
    options = tyro.cli(ConvertOptions, prog="python -m phi_fast.convert", config=(tyro.conf.AvoidSubcommands,))
    screen = console(stderr=True, soft_wrap=True)
    try:
        with screen.status(Text("reading")) as status:
            convert(
                options,
                lambda done, of: status.update(Text(f"tensor {done} of {of}")),
                lambda line: screen.print(printable(line)),
            )
    except (ConversionError, ValueError, OSError) as error:
        screen.print(printable(f"error: {error}"), style="red")
        return 2
    except KeyboardInterrupt:
        return 130
    if options.gguf is not None:
        screen.print(printable(f"wrote {options.gguf} (GGUF)"))
    if options.out is not None:
        screen.print(printable(f"wrote {options.out} ({options.to} layout)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

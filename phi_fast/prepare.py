"""`python -m phi_fast.prepare INPUTS --tokenizer T --out DIR`: turn text, code and datasets into a token corpus.

With --chat the inputs are conversations. `--recipe NAME` prepares every corpus of a recipe with open data. Also
`--inspect DIR` (describe a corpus and verify its checksums) and `--adopt FILE` (wrap another program's token file).
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.prepare")

import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from .data.preparation.adoption import adopt
from .data.preparation.containers import PrepareError
from .data.preparation.inspection import inspect
from .data.preparation.open_recipe import prepare_recipe
from .data.preparation.pipeline import Settings, prepare
from .data.remote_files import PATIENCE, Patience, is_url
from .data.vocabulary import END_OF_TEXT
from .errors import PhiFastError
from .recipes import RECIPES
from .startup import tolerate_encodings
from .terminal import console, printable


@dataclass(frozen=True)
class Options:
    """Make a token corpus from text, or inspect one."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files and folders: text, source code, JSONL (also .gz, .bz2, .xz, .zst), Parquet, saved Hugging Face datasets.
    Also URLs, read in place: https://…, s3://BUCKET/…, gs://BUCKET/…, hf://datasets/OWNER/NAME[@REVISION]/…"""
    tokenizer: str | None = None
    """"phi-1.5", a tokenizer.json or a directory with one, or a name on the Hugging Face hub."""
    out: Path | None = None
    """Directory of the corpus to write; it must not exist yet. With --recipe: the directory of its corpora."""
    recipe: str | None = None
    """"phi-1.5-open" or "phi-1.5-web-open": prepare each of its corpora, from the Hugging Face hub. What this needs is
    told first; the same command resumes, and skips what is finished."""
    source: Path | None = None
    """With --recipe: read the data sets from this folder, as OWNER/NAME/…, in place of the hub."""
    dry_run: bool = False
    """With --recipe: tell the disk, network and time it needs, and write nothing."""
    attempts: int = PATIENCE.attempts
    """Attempts per request to a server, with growing waits between them."""
    timeout: float = PATIENCE.timeout
    """Seconds to wait for a server's next bytes."""
    dtype: Literal["uint16", "uint32"] | None = None
    """dtype of the token file. None: uint16 if the tokenizer's ids fit."""
    delimiter: str | None = END_OF_TEXT
    """Token written after each document. None: no token."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and datasets."""
    suffixes: tuple[str, ...] = Settings.suffixes
    """Name suffixes of the files in a folder that become one document each."""
    validation: float = Settings.validation
    """Share of documents held out for validation, by a hash of their text: 0 to below 1."""
    seed: int = 0
    """Seed of the document shuffle and of the validation split."""
    skip_malformed: bool = False
    """Skip and count records that are not UTF-8, not JSON or have no text, instead of stopping."""
    chat: bool = False
    """Read conversations from JSONL: records with "messages" ({"role", "content"}), or "prompt" and "completion". Whole
    conversations are packed into rows, for --document-isolation."""
    chat_template: Path | None = None
    """File with a Jinja template for --chat. Default: the tokenizer's own, else "Instruct: …", "Output: …"."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens of --chat that count in the loss: what the assistant writes (or a completion), or all."""
    row_tokens: int = 2048
    """Tokens per row of --chat: the training's --sequence-length. Longer conversations are cut."""
    workers: int | None = None
    """Number of processes. None: one per core. The corpus does not depend on it."""
    inspect: Path | None = None
    """Describe this corpus instead: counts, lengths, samples; every checksum is verified."""
    samples: int = 3
    """Number of documents that --inspect shows."""
    adopt: tuple[Path, ...] = ()
    """Wrap another program's token file, and a second one for validation, as a corpus in --out; no token is copied."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 after an error, 130 after Ctrl-C."""
    tolerate_encodings()
    options = tyro.cli(Options, args=arguments, prog="python -m phi_fast.prepare", description=__doc__)
    try:
        run(options, console(soft_wrap=True))
    except (PhiFastError, OSError) as error:
        print(f"phi_fast.prepare: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nphi_fast.prepare: stopped. The same command takes up where this one was.", file=sys.stderr)
        return 130
    return 0


def run(options: Options, output: Console) -> None:
    """Carry out the options. Raises PrepareError for options that exclude each other."""
    if options.samples < 0:
        raise PrepareError(f"--samples {options.samples}: expected 0 or more")
    if options.inspect is not None:
        for line in inspect(options.inspect, options.samples):
            print(line)
        return
    if options.attempts < 1 or not 0 < options.timeout < math.inf:
        given = f"--attempts {options.attempts}, --timeout {options.timeout}"
        raise PrepareError(f"{given}: expected at least 1 attempt, and more than 0 seconds")
    patience = Patience(attempts=options.attempts, timeout=options.timeout)
    if options.recipe is not None:
        _prepare_recipe(options, options.recipe, patience, output)
        return
    if options.source is not None or options.dry_run:
        raise PrepareError("--source and --dry-run belong to --recipe: add it, or leave them out")
    if options.tokenizer is None or options.out is None:
        raise PrepareError("name a --tokenizer and where to write, --out; or a corpus to describe, --inspect")
    if options.chat and options.adopt:
        raise PrepareError("--adopt wraps tokens, and --chat makes them from conversations: give one of them")
    settings = _settings(options)
    if bool(options.inputs) == bool(options.adopt):
        raise PrepareError("name the files or folders to prepare, or a token file to wrap with --adopt, and not both")
    if options.adopt:
        manifest = adopt(list(options.adopt), options.out, settings, output)
    else:
        manifest = prepare(
            places(options.inputs), options.out, settings, workers=options.workers, console=output, patience=patience
        )
    for name, split in manifest.splits.items():
        output.print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    output.print(f"written: {printable(str(options.out))}")


def _settings(options: Options) -> Settings:
    return Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})


def _prepare_recipe(options: Options, name: str, patience: Patience, output: Console) -> None:
    """Carry out --recipe. Raises PrepareError for options that exclude it."""
    if options.inputs or options.adopt or options.chat or options.text_field != Options.text_field:
        raise PrepareError("--recipe names its own inputs: leave out INPUTS, --adopt, --chat and --text-field")
    tokenizer = options.tokenizer or (RECIPES[name].tokenizer if name in RECIPES else "phi-1.5")
    prepare_recipe(
        name,
        options.out,
        _settings(replace(options, tokenizer=tokenizer)),
        source=options.source,
        dry_run=options.dry_run,
        workers=options.workers,
        console=output,
        patience=patience,
    )


def places(inputs: tuple[str, ...]) -> list[Path | str]:
    """The inputs as `pipeline.prepare` takes them: a Path, or the text of a URL."""
    return [text if is_url(text) else Path(text) for text in inputs]


if __name__ == "__main__":
    sys.exit(main())

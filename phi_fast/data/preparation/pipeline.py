"""Makes a corpus from inputs: worker processes encode tasks, units are merged, the result is renamed into place."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from ...errors import UsageError
from ...files import Claim, sync_directory, write_atomically
from ..chat import ChatFiles
from ..manifest import DTYPES, FILE_NAME, Delimiter, Manifest
from ..remote_files import PATIENCE, Patience
from ..vocabulary import END_OF_TEXT, TokenizerError, digest, tokenizer, vocab_size
from .containers import PrepareError
from .conversations import MARKED, Conversations, MarkedEncoding, TrainOn
from .inputs import FOLDER_SUFFIXES, Input, find_inputs
from .merge import merge
from .packing import pack_splits
from .plans import partial_of, record_plan, unit_settings
from .processes import follow_parent, start_method
from .progress import Meter
from .readers import Reader, check_field
from .task import Task
from .tasks import cut
from .units import Encoding, Summary, completed, encode_unit

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**20, 2**24
"""Size of the text that a worker encodes at a time: large enough to sync to disk, small enough to distribute evenly
and to lose when interrupted."""


@dataclass(frozen=True)
class Settings:
    """Everything that determines the corpus's content. The number of workers does not."""

    tokenizer: str
    """"phi-1.5", a tokenizer.json or its directory, or a name on the Hugging Face hub."""
    dtype: str | None = None
    """"uint16" or "uint32"; None: the narrowest that holds the tokenizer's ids."""
    delimiter: str | None = END_OF_TEXT
    """Token written after each document; None for none."""
    text_field: str = "text"
    """JSONL, Parquet, datasets: the field that holds the text."""
    suffixes: tuple[str, ...] = FOLDER_SUFFIXES
    """Suffixes of files in a folder that are one document each."""
    validation: float = 0.005
    """Share of documents held out, 0…1, by a hash of their text."""
    seed: int = 0
    """Random seed for the document shuffle and the validation split."""
    skip_malformed: bool = False
    """Leave out records that are not UTF-8, not JSON or without a text, and count them; otherwise stop at the first."""
    chat: bool = False
    """Whether the inputs are conversations: JSONL with "messages", or "prompt" and "completion"."""
    chat_template: Path | None = None
    """Conversations: file with a Jinja template; None: the tokenizer's own, else `chat.DEFAULT_TEMPLATE`."""
    train_on: TrainOn = "assistant"
    """Conversations: the tokens that count in the loss."""
    row_tokens: int = 2048
    """Conversations: tokens per row that whole conversations are packed into."""


def prepare(
    paths: list[Path | str],
    out: Path,
    settings: Settings,
    *,
    workers: int | None = None,
    console: Console,
    patience: Patience = PATIENCE,
) -> Manifest:
    """Write a corpus of the documents in `paths` to the directory `out`: the same bytes for any number of workers.

    paths: files and folders; a text is a URL. patience: how long to wait for servers.

    Work in progress lies in `out`.partial; the next call with the same inputs and settings resumes it.

    Raises PrepareError, TokenizerError, RemoteError and OSError, before any work where possible.
    """
    if workers is not None and workers < 1:
        raise PrepareError(f"--workers {workers}: expected at least 1, or None for one per core")
    encoder, encoding, manifest = plan_encoding(settings)
    place = check_place(out)
    inputs = find_inputs(paths, settings.suffixes, settings.text_field, patience)
    check_field(inputs.read, settings.text_field)
    unit_bytes = unit_size(inputs.read)
    plan = plan_fields(settings, encoder)
    conversations = None
    if settings.chat:
        conversations, encoding = _plan_chat(settings, encoder, inputs.read)
        manifest = replace(manifest, delimiter=Delimiter(conversations.end))
        plan |= {name: getattr(settings, name) for name in _OF_CHAT}
        plan["chat_template"] = conversations.tokenizer.chat_template
    workers = workers or available_cores()
    reader = Reader(settings.text_field, settings.skip_malformed, conversations)
    with _partial(place, plan) as partial, _pool(workers, encoding, reader) as pool:
        work = _Work(partial, encoding.dtype, unit_settings(plan), settings)
        units = _encode_all(pool, workers, work, inputs.read, unit_bytes, console)
        corpus = partial / "corpus"
        shutil.rmtree(corpus, ignore_errors=True)  # left by an interrupted merge
        corpus.mkdir()
        console.print("merging, shuffled by document")
        manifest = replace(manifest, splits=merge(units, corpus, encoding.dtype, pool.map))
        if conversations is not None:
            splits = pack_splits(
                manifest.splits, corpus, manifest.numpy_dtype, settings.row_tokens, conversations.end, console.print
            )
            manifest = replace(manifest, splits=splits)
            ChatFiles.of(conversations.tokenizer).write(corpus)
        if "train" not in manifest.splits:
            raise PrepareError(_no_training(paths, settings.validation, manifest))
        save_tokenizer(encoder, corpus)
        manifest.write(corpus)
        _put_in_place(corpus, place)
    console.print("\n".join(inputs.summary()))
    if work.skipped:
        console.print(f"left out {work.skipped:,} malformed records")
    if settings.validation and "validation" not in manifest.splits:
        console.print(_no_validation(settings.validation, work.least_hash, manifest.splits["train"].documents))
    return manifest


def unit_size(inputs: list[Input]) -> int:
    """Bytes of text per unit: a power of two, so that a correction of the inputs rarely changes it."""
    total = sum(entry.size for entry in inputs)
    return min(max(2 ** int(math.log2(max(total // 512, 1))), MIN_UNIT_BYTES), MAX_UNIT_BYTES)


def plan_fields(settings: Settings, encoder: Tokenizer) -> dict[str, Any]:
    """What determines the units of texts; a resumed run compares it with its record."""
    plan = {name: value for name, value in asdict(settings).items() if name not in _OF_CHAT}
    return {**plan, "tokenizer": digest(encoder)}


def _no_training(paths: list[Path | str], share: float, manifest: Manifest) -> str:
    named = ", ".join(map(str, paths))
    if "validation" in manifest.splits:
        documents = manifest.splits["validation"].documents
        return f"no documents for training in {named}: all {documents:,} fall in --validation {share}. Lower it"
    return f"no documents for training in {named}: are the inputs empty?"


def _no_validation(share: float, least_hash: int, documents: int) -> str:
    """The message for a corpus without a validation split, with the smallest share that would give one."""
    enough = math.ceil((least_hash / 2**64 + 1e-6) * 1e4) / 1e4
    more = f"prepare it again, to another --out, with --validation {enough:.4g} or more"
    return (
        f"no validation split: none of {documents:,} documents falls in a share of {share}. To measure a validation "
        f"loss while training, {more if documents > 1 else 'add documents'}; without, train with --val-every 0"
    )


def save_tokenizer(encoder: Tokenizer, directory: Path) -> None:
    """Write `directory`/tokenizer.json. (The tokenizer's own `save` accepts only UTF-8 paths.)"""
    write_atomically(directory / "tokenizer.json", encoder.to_str(pretty=True).encode())


def check_place(out: Path) -> Path:
    """The real path of `out`, links followed. Raises PrepareError if a corpus cannot be written there.

    An empty directory is accepted. Everything that would fail after the work is refused here.
    """
    place = Path(os.path.realpath(out))
    if place.exists():
        if not place.is_dir() or any(place.iterdir()):
            raise PrepareError(f"{out} exists and is not empty: name another --out, or remove it")
        if place.is_mount():
            raise PrepareError(
                f"{out} is a mount point, which cannot be replaced: name a folder in it, {out / 'corpus'}"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise PrepareError(f"{out} cannot be written: permission denied. Name another --out")
    return place


def _put_in_place(corpus: Path, out: Path) -> None:
    """Rename a finished corpus to `out`, or move its files into an existing empty `out`, the manifest last."""
    if not out.exists():
        corpus.rename(out)
    else:  # it may be a process's current directory
        for file in sorted(corpus.iterdir(), key=lambda file: file.name == FILE_NAME):
            file.rename(out / file.name)
        sync_directory(out)
    sync_directory(out.parent)


def plan_encoding(settings: Settings) -> tuple[Tokenizer, Encoding, Manifest]:
    """The tokenizer, the encoding settings, and the manifest without its splits.

    Raises TokenizerError and PrepareError for settings that do not fit together.
    """
    if not 0 <= settings.validation < 1:
        raise PrepareError(f"--validation {settings.validation}: expected a share of the documents, 0 to below 1")
    if not 0 <= settings.seed < 2**64:
        raise PrepareError(f"--seed {settings.seed}: expected 0 to below 2**64")
    encoder = tokenizer(settings.tokenizer)
    encoder.no_truncation()
    encoder.no_padding()
    size = vocab_size(encoder)
    dtype = choose_dtype(settings.dtype, size, settings.tokenizer)
    delimiter = None
    if settings.delimiter is not None and not settings.chat:
        delimiter = encoder.token_to_id(settings.delimiter)
        if delimiter is None:
            raise TokenizerError(
                f"tokenizer {settings.tokenizer!r} has no token {settings.delimiter!r} to put between documents: name "
                "its own with --delimiter, or --delimiter None for none"
            )
    manifest = Manifest(
        dtype=dtype,
        tokenizer=settings.tokenizer,
        tokenizer_sha256=digest(encoder),
        vocab_size=size,
        delimiter=None if delimiter is None else Delimiter(delimiter),
        splits={},
    )
    return encoder, Encoding(encoder, delimiter, DTYPES[dtype], settings.seed, settings.validation), manifest


_OF_CHAT = ("chat", "chat_template", "train_on", "row_tokens")
"""Settings that only conversations have."""


def _plan_chat(settings: Settings, encoder: Tokenizer, inputs: list[Input]) -> tuple[Conversations, Encoding]:
    """The reader of conversations, and how they are encoded. Raises PrepareError for settings that do not fit."""
    if settings.row_tokens < 2:
        raise PrepareError(f"--row-tokens {settings.row_tokens}: expected at least 2")
    for entry in inputs:
        if entry.kind != "lines":
            raise PrepareError(f"{entry.path} is not JSONL: --chat reads conversations from .jsonl files, one per line")
    conversations = Conversations.of(encoder, settings.tokenizer, settings.chat_template, settings.train_on)
    return conversations, MarkedEncoding(encoder, None, MARKED, settings.seed, settings.validation)


def choose_dtype(asked: str | None, vocab_size: int, tokenizer: str) -> str:
    """The dtype asked for, or the narrowest possible. Raises PrepareError if the ids do not fit."""
    if asked is not None and asked not in DTYPES:
        raise PrepareError(f"--dtype {asked!r} is not one of {', '.join(map(repr, DTYPES))}")
    dtype = asked or ("uint16" if vocab_size <= 2**16 else "uint32")
    if vocab_size - 1 > np.iinfo(DTYPES[dtype]).max:
        raise PrepareError(
            f"--dtype {dtype} holds ids up to {np.iinfo(DTYPES[dtype]).max}, and tokenizer {tokenizer!r} has "
            f"{vocab_size} ids: use --dtype uint32"
        )
    return dtype


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _partial(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The directory of work in progress, locked; removed when the work is done, kept if it is interrupted.

    Work resumes even with other inputs, and after a change of `plans.MAY_CHANGE`: each unit has the key of its task.
    """
    partial = partial_of(out)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        claim = Claim.take(partial / "lock", str(out), way_out="wait for it, or name another --out")
    except UsageError as error:
        raise PrepareError(f"another prepare is writing {out}: {error}") from None
    with claim:
        record_plan(partial, plan)
        yield partial
        shutil.rmtree(partial)


@dataclass
class _Work:
    """Units in a directory, and their totals."""

    directory: Path
    dtype: np.dtype[Any]
    made_by: bytes
    """Settings and tokenizer, for the units' keys."""
    settings: Settings
    skipped: int = 0
    """Number of malformed records left out."""
    least_hash: int = 2**64 - 1
    """Smallest of all documents' hashes."""

    def count(self, summary: Summary) -> None:
        self.skipped += summary.skipped
        self.least_hash = min(self.least_hash, summary.least_hash)

    def completed(self, unit: Path, key: bytes) -> Summary | None:
        """The summary of a unit that can be kept, else None. A unit that left out records is made again if malformed
        records are errors now."""
        done = completed(unit, self.dtype, key)
        return done if done and (self.settings.skip_malformed or not done.skipped) else None


def _encode_all(
    pool: ProcessPoolExecutor, workers: int, work: _Work, inputs: list[Input], unit_bytes: int, console: Console
) -> list[Path]:
    """Encode every task that has no complete unit yet. Returns all units in order."""
    units: list[Path] = []
    running: dict[Future[Summary], Task] = {}
    began, kept = any(work.directory.glob("*.index")), 0
    with Meter("encoding", sum(entry.size for entry in inputs), console) as meter:

        def collect(limit: int) -> None:
            while len(running) > limit:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    summary = done.result()
                    meter.advance(running.pop(done).size, summary.tokens)
                    work.count(summary)

        for number, task in enumerate(cut(inputs, unit_bytes, work.directory)):
            unit, key = work.directory / f"{number:07d}", task.key(work.made_by)
            units.append(unit)
            if (done := work.completed(unit, key)) is not None:
                meter.advance(task.size, done.tokens, before=True)
                work.count(done)
                kept += 1
            else:
                running[pool.submit(_encode_task, unit, number, task.loaded(), key)] = task
                collect(2 * workers)
        collect(0)
    if began:
        console.print(f"kept {kept:,} of {len(units):,} parts from before; the others are new, or their inputs changed")
    return units


@contextmanager
def _pool(workers: int, encoding: Encoding, reader: Reader) -> Iterator[ProcessPoolExecutor]:
    """Worker processes."""
    pool = ProcessPoolExecutor(workers, start_method(__name__), _start_worker, (encoding, reader))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Encoding, Reader]
"""State of a worker process, set once when it starts."""


def _start_worker(encoding: Encoding, reader: Reader) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    follow_parent()
    _worker = encoding, reader


def _encode_task(unit: Path, number: int, task: Task, key: bytes) -> Summary:
    """Encode one task as a worker."""
    encoding, reader = _worker
    before = reader.skipped
    return encode_unit(unit, number, reader.documents(task), encoding, key, lambda: reader.skipped - before)

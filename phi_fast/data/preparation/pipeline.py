"""Inputs to corpus: tasks encoded by worker processes, units merged, the whole renamed into place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from tokenizers import Tokenizer

from ...files import sync_directory, write_atomically
from ..manifest import DTYPES, Delimiter, Manifest
from ..vocabulary import END_OF_TEXT, TokenizerError, digest, tokenizer, vocab_size
from .inputs import FOLDER_SUFFIXES, Input, PrepareError, find_inputs, fingerprint
from .merge import merge
from .progress import Meter
from .readers import Reader, check_field
from .tasks import Task, cut
from .units import Encoding, encode_unit, is_complete

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**20, 2**24
"""Text that a worker encodes at a time: large enough to sync to disk, small enough to share out and to lose."""


@dataclass(frozen=True)
class Settings:
    """What makes the corpus what it is. The number of workers is not among it."""

    tokenizer: str
    """"phi-1.5", a tokenizer.json or its directory, or a name on the Hugging Face hub."""
    dtype: str | None = None
    """"uint16" or "uint32"; None: the narrower one that holds the tokenizer's ids."""
    delimiter: str | None = END_OF_TEXT
    """Token written after each document; None for none."""
    text_field: str = "text"
    """JSONL, Parquet, datasets: the field that holds the text."""
    suffixes: tuple[str, ...] = FOLDER_SUFFIXES
    """File names' ends that a folder gives as documents."""
    validation: float = 0.005
    """Share of documents held out, 0…1, by a hash of their text."""
    seed: int = 0
    """Of the document shuffle and of the validation split."""
    skip_malformed: bool = False
    """Leave out records that are not UTF-8, not JSON or without a text, and count them; otherwise stop at the first."""


def prepare(
    paths: list[Path], out: Path, settings: Settings, *, workers: int | None = None, console: Console
) -> Manifest:
    """Write the corpus of the documents in `paths` to the directory `out`, the same bytes for any number of workers.

    Work in progress lies in `out`.partial and is taken up by the next call with the same inputs and settings.

    Raises PrepareError, TokenizerError and OSError, before any work where it can be told.
    """
    if workers is not None and workers < 1:
        raise PrepareError(f"--workers {workers}: expected at least 1, or None for one a core")
    encoder, encoding, manifest = plan_encoding(settings)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepareError(f"{out} exists and is not empty: name another --out, or remove it")
    inputs = find_inputs(paths, settings.suffixes)
    check_field(inputs, settings.text_field)
    total = sum(entry.size for entry in inputs)
    unit_bytes = min(max(total // 512, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    plan = {**asdict(settings), "tokenizer": digest(encoder), "inputs": fingerprint(inputs), "unit_bytes": unit_bytes}
    workers = workers or available_cores()
    with _partial(out, plan) as partial, _pool(workers, encoding, settings) as pool:
        units, skipped = _encode_all(pool, workers, partial, inputs, unit_bytes, encoding.dtype, console)
        corpus = partial / "corpus"
        shutil.rmtree(corpus, ignore_errors=True)  # of a merge that was interrupted
        corpus.mkdir()
        console.print("merging, shuffled by document", highlight=False)
        manifest = replace(manifest, splits=merge(units, corpus, encoding.dtype, pool.map))
        if "train" not in manifest.splits:
            raise PrepareError(f"no documents for training in {', '.join(map(str, paths))}: are the inputs empty?")
        encoder.save(str(corpus / "tokenizer.json"))
        manifest.write(corpus)
        if out.exists():
            out.rmdir()
        corpus.rename(out)
        sync_directory(out.parent)
    if skipped:
        console.print(f"left out {skipped:,} malformed records", highlight=False)
    if settings.validation and "validation" not in manifest.splits:
        console.print(
            f"no validation split: none of so few documents is in a share of {settings.validation}", highlight=False
        )
    return manifest


def plan_encoding(settings: Settings) -> tuple[Tokenizer, Encoding, Manifest]:
    """The tokenizer, how it encodes, and the manifest without its splits.

    Raises TokenizerError and PrepareError for what cannot be written as asked.
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
    if settings.delimiter is not None:
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


def choose_dtype(asked: str | None, vocab_size: int, tokenizer: str) -> str:
    """The dtype asked for, or the narrowest. Raises PrepareError where the ids do not fit."""
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
    """The directory of work in progress, locked; removed when the work is done, kept when it is not."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise PrepareError(f"another prepare is writing {out}: wait for it, or name another --out") from None
    try:
        record, written = partial / "plan.json", json.dumps(plan, indent=1).encode()
        if not record.exists():
            write_atomically(record, written)
        elif record.read_bytes() != written:
            before = json.loads(record.read_bytes())
            changed = [name for name in plan if json.loads(written)[name] != before.get(name)]
            raise PrepareError(
                f"{partial} holds work begun with other {', '.join(changed)}: run with what it was begun with to go "
                "on, or remove it to begin anew"
            )
        yield partial
    finally:
        lock.release()
    shutil.rmtree(partial)


def _encode_all(
    pool: ProcessPoolExecutor,
    workers: int,
    partial: Path,
    inputs: list[Input],
    unit_bytes: int,
    dtype: np.dtype[Any],
    console: Console,
) -> tuple[list[Path], int]:
    """Encode every task that has no complete unit yet. Returns all units in order, and malformed records left out."""
    units: list[Path] = []
    running: dict[Future[tuple[int, int]], Task] = {}
    skipped = 0
    with Meter("encoding", sum(entry.size for entry in inputs), console) as meter:

        def collect(limit: int) -> None:
            nonlocal skipped
            while len(running) > limit:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    tokens, malformed = done.result()
                    meter.advance(running.pop(done).size, tokens)
                    skipped += malformed

        for number, task in enumerate(cut(inputs, unit_bytes)):
            unit = partial / f"{number:07d}"
            units.append(unit)
            if is_complete(unit, dtype):
                meter.advance(task.size, unit.with_suffix(".tokens").stat().st_size // dtype.itemsize, before=True)
            else:
                running[pool.submit(_encode_task, unit, number, task)] = task
                collect(2 * workers)
        collect(0)
    return units, skipped


@contextmanager
def _pool(workers: int, encoding: Encoding, settings: Settings) -> Iterator[ProcessPoolExecutor]:
    """Worker processes."""
    reader = Reader(settings.text_field, settings.skip_malformed)
    pool = ProcessPoolExecutor(workers, _context(), _start_worker, (encoding, reader))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """How workers start: not forked from this process, which has threads; imports are done once where possible."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


_worker: tuple[Encoding, Reader]
"""Of a worker process: set once, when it starts."""


def _start_worker(encoding: Encoding, reader: Reader) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = encoding, reader


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the executor's queues would keep a worker waiting for ever


def _encode_task(unit: Path, number: int, task: Task) -> tuple[int, int]:
    """Tokens written, and malformed records left out."""
    encoding, reader = _worker
    before = reader.skipped
    return encode_unit(unit, number, reader.documents(task), encoding), reader.skipped - before

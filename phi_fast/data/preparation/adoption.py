"""Wraps token files of other programs as a corpus: adds a manifest and document ends, and copies no token."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...files import sync_directory
from ...terminal import printable
from ..formats import TokenLayout, open_layout
from ..manifest import BLOCK_BYTES, DTYPES, Delimiter, Manifest, Split
from ..plain_reads import read_array, read_blocks
from .containers import PrepareError
from .pipeline import Settings, plan_encoding, save_tokenizer
from .progress import Meter

_Array = np.ndarray[Any, Any]


def adopt(files: list[Path], out: Path, settings: Settings, console: Console) -> Manifest:
    """Write a corpus directory `out` around token files: the first is its train split, the second its validation split.

    Supported formats: llm.c, Megatron, datatrove, NumPy, and files without a header, which need `settings.dtype`. The
    file's own index separates the documents, or else `settings.delimiter` does.

    Raises FormatError for a file that cannot be read, and PrepareError for ids that the tokenizer does not have.
    """
    if not 1 <= len(files) <= 2:
        raise PrepareError(
            f"--adopt takes a train file and, if there is one, a validation file; {len(files)} were named"
        )
    out = Path(os.path.realpath(out))  # follows the user's links
    if out.exists():
        raise PrepareError(f"{out} exists: name another --out, or remove it")
    layouts = [open_layout(path, dtype=settings.dtype) for path in files]
    dtypes = {layout.dtype for layout in layouts}
    if len(dtypes) > 1:
        raise PrepareError(f"{files[0]} and {files[1]} have different dtypes: adopt each as a separate corpus")
    encoder, encoding, manifest = plan_encoding(replace(settings, dtype=None))
    manifest = replace(manifest, dtype=layouts[0].dtype)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        splits, delimiters = {}, set()
        for name, layout in zip(("train", "validation"), layouts, strict=False):
            split, delimiter = _wrap(layout, name, aside, out, encoding.delimiter, manifest.vocab_size, console)
            splits[name] = split
            delimiters.add(delimiter)
        common = delimiters.pop() if len(delimiters) == 1 else None
        manifest = replace(manifest, splits=splits, delimiter=common)
        save_tokenizer(encoder, aside)
        manifest.write(aside)
        aside.chmod(0o755)  # mkdtemp makes it private
        aside.rename(out)
        sync_directory(out.absolute().parent)
    except BaseException:
        shutil.rmtree(aside)
        raise
    return manifest


def _wrap(
    layout: TokenLayout,
    name: str,
    aside: Path,
    out: Path,
    delimiter: int | None,
    vocab_size: int,
    console: Console,
) -> tuple[Split, Delimiter | None]:
    """Make a split from one file: read its tokens once, and write its document ends."""
    checksums, places, largest = _read(layout, delimiter, console)
    if largest >= vocab_size:
        raise PrepareError(
            f"{layout.path} has id {largest}, and the tokenizer has {vocab_size} ids: it was encoded with another one"
        )
    ends = _indexed_ends(layout)
    if ends is None:
        if not len(places):
            console.print(f"{printable(str(layout.path))} is one document: it does not contain id {delimiter}")
        ends = _delimited_ends(places, layout.tokens)
    (aside / f"{name}.ends").write_bytes(ends.astype("<u8").tobytes())
    split = Split(
        file=os.path.relpath(layout.path.resolve(), out.absolute().parent.resolve() / out.name),
        ends=f"{name}.ends",
        tokens=layout.tokens,
        documents=len(ends),
        max_id=largest,
        sha256=tuple(checksums),
        offset=layout.offset,
        adopted=True,
    )
    return split, _delimiter_of(places, ends, delimiter)


def _read(layout: TokenLayout, delimiter: int | None, console: Console) -> tuple[list[str], _Array, int]:
    """Read all tokens. Returns the checksum of each block, the places of the delimiter, and the largest id."""
    checksums, places, largest, start = [], [np.empty(0, np.int64)], 0, 0
    step = BLOCK_BYTES // layout.width
    with Meter(f"reading {layout.path.name}", layout.bytes, console) as meter:
        for block in read_blocks(layout.path, DTYPES[layout.dtype], layout.tokens, layout.offset, step):
            checksums.append(hashlib.sha256(block.data).hexdigest())
            largest = max(largest, int(block.max()))
            if delimiter is not None:
                places.append(np.flatnonzero(block == delimiter) + start)
            start += len(block)
            meter.advance(block.nbytes, len(block))
    return checksums, np.concatenate(places), largest


def _indexed_ends(layout: TokenLayout) -> _Array | None:
    """Document ends from the file's own index; None if it has no index."""
    if layout.format == "datatrove":
        index = layout.path.with_name(layout.path.name + ".index")
        ends = read_array(index, "<u8", index.stat().st_size // 8).astype(np.int64)
    elif layout.format == "megatron":
        index = layout.path.with_suffix(".idx")
        ends = _megatron_ends(index)
    else:
        return None
    if len(ends) == 0 or ends[0] < 0 or (ends[1:] < ends[:-1]).any() or ends[-1] != layout.tokens:
        raise PrepareError(
            f"{index}: its documents do not ascend to the {layout.tokens} tokens of {layout.path.name}. Copy both again"
        )
    return np.unique(ends[ends > 0])  # empty documents are left out


def _megatron_ends(index: Path) -> _Array:
    """Document ends from Megatron's index. From byte 18: u64 sequences, u64 documents + 1; then i32 lengths and i64
    pointers of the sequences, and the i64 first sequence of each document."""
    sequences, entries = (int(count) for count in read_array(index, "<u8", 2, 18))
    lengths = read_array(index, "<i4", sequences, 34)
    documents = read_array(index, "<i8", entries, 34 + 12 * sequences)
    if ((documents < 0) | (documents > sequences)).any():
        raise PrepareError(f"{index}: a document begins at a sequence that is not among its {sequences}. Copy it again")
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # tokens before each sequence, and all
    return before[documents]


def _delimited_ends(places: _Array, tokens: int) -> _Array:
    """Document ends from delimiters, which end documents, or begin them if the file begins with one."""
    opens = len(places) > 0 and places[0] == 0 and places[-1] != tokens - 1
    ends = places[1:] if opens else places + 1
    return ends if len(ends) and ends[-1] == tokens else np.append(ends, tokens)


def _delimiter_of(places: _Array, ends: _Array, delimiter: int | None) -> Delimiter | None:
    """The delimiter and its side, if every document has it. Only the last may lack it at its end: it may be cut.

    places: indices of the delimiter in the file, ascending.
    """
    if delimiter is None or not len(places):
        return None
    ends = ends.astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    if np.isin(starts, places, assume_unique=True).all() and places[-1] != ends[-1] - 1:
        return Delimiter(delimiter, "before")
    closed = np.isin(ends - 1, places, assume_unique=True)
    return Delimiter(delimiter, "after") if closed[:-1].all() and closed.any() else None

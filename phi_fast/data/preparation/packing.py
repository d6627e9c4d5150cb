"""Packs whole conversations into rows of one length, first-fit, the longest first, and writes tokens and marks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...files import sync_directory, sync_file
from ..manifest import BEGINS, BLOCK_BYTES, TRAINED, Split
from ..plain_reads import open_regular, read_array
from .containers import PrepareError
from .conversations import MARK_BIT, MARKED, split_marks
from .merge import check_block

_Array = np.ndarray[Any, Any]

OPEN_ROWS = 512
"""Number of rows that conversations are fitted into at a time. The fullest is closed when one more is needed."""

SORTED = 4096
"""Number of conversations that are sorted at a time, so that short ones are left to fill the rows of long ones."""


@dataclass
class Packed:
    """Counts of what `pack` did with the conversations of a split."""

    conversations: int = 0
    rows: int = 0
    tokens: int = 0
    """Tokens of conversations, without the rows' padding."""
    trained: int = 0
    """Tokens that count in the loss."""
    cut: int = 0
    """Conversations longer than a row, of which only the beginning is kept."""
    left_out: int = 0
    """Conversations longer than a row, in which nothing up to the cut would be trained."""

    def lines(self, split: str, row_tokens: int) -> Iterator[str]:
        """Yield lines that describe it for a person."""
        full = self.tokens / max(1, self.rows * row_tokens)
        yield (
            f"{split}: {self.conversations:,} conversations in {self.rows:,} rows of {row_tokens:,} tokens, {full:.0%} "
            f"full; {self.trained:,} tokens are trained"
        )
        if self.cut:
            yield f"{split}: cut {self.cut:,} conversations to {row_tokens:,} tokens; --row-tokens sets the length"
        if self.left_out:
            yield f"{split}: left out {self.left_out:,} conversations whose answers begin after {row_tokens:,} tokens"


def pack_splits(
    splits: Mapping[str, Split],
    directory: Path,
    dtype: np.dtype[Any],
    row_tokens: int,
    padding: int,
    tell: Callable[[str], None],
) -> dict[str, Split]:
    """`pack` every split, and tell what was done. Raises PrepareError if no conversation of a split is left."""
    found = {}
    for name, split in splits.items():
        found[name], packed = pack(split, directory, dtype, row_tokens, padding)
        for line in packed.lines(name, row_tokens):
            tell(line)
        if not packed.rows:
            raise PrepareError(f"no conversation of {name} is left: raise --row-tokens {row_tokens}")
    return found


def pack(split: Split, directory: Path, dtype: np.dtype[Any], row_tokens: int, padding: int) -> tuple[Split, Packed]:
    """Replace a merged split of dtype `MARKED` in `directory` by one of packed rows: tokens, marks and document ends.

    A row's free end is filled with the id `padding`, as a document of its own that is not trained; in `ends` it counts
    to the row's last conversation. One more such token ends the file, as the label after the last row's last token.
    """
    packed = Packed()
    names = {"tokens": split.file, "ends": split.ends, "marks": f"{split.file.removesuffix('.bin')}.marks"}
    aside = {name: directory / f".{file}.packed" for name, file in names.items()}
    with (
        aside["tokens"].open("wb") as tokens_file,
        aside["marks"].open("wb") as marks_file,
        aside["ends"].open("wb") as ends_file,
    ):
        end_of_file = np.array([padding | BEGINS << MARK_BIT], MARKED)
        for row in _rows(_longest_first(_documents(split, directory, row_tokens, packed)), row_tokens):
            ends = packed.rows * row_tokens + np.cumsum([len(document) for document in row.documents])
            packed.rows += 1
            ends[-1] = packed.rows * row_tokens
            free = np.full(row.free, padding, MARKED)
            free[:1] |= np.uint32(BEGINS << MARK_BIT)
            _write(np.concatenate([*row.documents, free]), dtype, tokens_file, marks_file)
            ends_file.write(ends.astype("<u8").data)
        _write(end_of_file, dtype, tokens_file, marks_file)
    total = packed.rows * row_tokens + 1
    _set_last_end(aside["ends"], total)
    for name, path in aside.items():
        sync_file(path)
        path.replace(directory / names[name])
    sync_directory(directory)
    blocks = [
        check_block(directory / names["tokens"], dtype, at) for at in range(0, total * dtype.itemsize, BLOCK_BYTES)
    ]
    marks = [check_block(directory / names["marks"], np.dtype("u1"), at) for at in range(0, total, BLOCK_BYTES)]
    return (
        replace(
            split,
            tokens=total,
            documents=packed.conversations,
            max_id=max(largest for _, largest in blocks),
            sha256=tuple(checksum for checksum, _ in blocks),
            marks=names["marks"],
            marks_sha256=tuple(checksum for checksum, _ in marks),
            row_tokens=row_tokens,
        ),
        packed,
    )


@dataclass
class _Row:
    """A row that is being filled."""

    free: int
    documents: list[_Array] = field(default_factory=list)

    def add(self, document: _Array) -> None:
        self.documents.append(document)
        self.free -= len(document)


def _rows(documents: Iterator[_Array], row_tokens: int) -> Iterator[_Row]:
    """Fit each document into the first open row that has room for it; yields the rows as they are closed."""
    rows: list[_Row] = []
    room = np.zeros(0, np.int64)  # the open rows' free tokens
    for document in documents:
        fitting = np.flatnonzero(room >= len(document))
        if len(fitting):
            first = int(fitting[0])
        else:
            if len(rows) == OPEN_ROWS:
                fullest = int(np.argmin(room))
                yield rows.pop(fullest)
                room = np.delete(room, fullest)
            rows.append(_Row(row_tokens))
            room = np.append(room, row_tokens)
            first = len(rows) - 1
        rows[first].add(document)
        room[first] -= len(document)
    yield from rows


def _longest_first(documents: Iterator[_Array]) -> Iterator[_Array]:
    """Yield the documents by falling length, within each `SORTED` of them."""
    while some := list(islice(documents, SORTED)):
        yield from sorted(some, key=len, reverse=True)


def _documents(split: Split, directory: Path, row_tokens: int, packed: Packed) -> Iterator[_Array]:
    """Yield the split's conversations, cut to a row, and count them."""
    ends = read_array(directory / split.ends, "<u8", split.documents).astype(np.int64)
    with open_regular(directory / split.file) as file:
        for start, end in pairwise([0, *ends.tolist()]):
            document = read_array(file, MARKED, min(end - start, row_tokens), start * MARKED.itemsize)
            trained = int(np.count_nonzero(split_marks(document)[1] & TRAINED))
            too_long = end - start > row_tokens
            if too_long and not trained:
                packed.left_out += 1
                continue
            packed.cut += too_long
            packed.conversations += 1
            packed.tokens += len(document)
            packed.trained += trained
            yield document


def _write(tokens: _Array, dtype: np.dtype[Any], tokens_file: Any, marks_file: Any) -> None:
    ids, marks = split_marks(tokens)
    tokens_file.write(ids.astype(dtype).data)
    marks_file.write(marks.data)


def _set_last_end(path: Path, total: int) -> None:
    """Let the last document end with the file."""
    if path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(-8, 2)
            file.write(total.to_bytes(8, "little"))

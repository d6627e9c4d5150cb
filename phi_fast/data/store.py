"""Corpora opened for reading: files checked, order known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phi_fast._C import tokens as _tokens

from .formats import Dtype, FormatError, TokenLayout, open_layout
from .mixture import Mixture

Mode = Literal["auto", "mmap", "pread"]
MAPPED_BYTES = 256 * 2**20
"""With mode="auto", corpora that together are larger are read instead of mapped.

A mapped row that was touched before costs one copy. One that was not costs page faults, and pages that were touched
count as the process's memory; handing them back makes the next touch a fault again. Measured on 4 KB rows in the page
cache, CPU time a row: mapped and touched 0.7 µs, mapped but not touched 3.8, handed back and touched again 9, read with
pread 2.4 (and nothing to hand back, and no signal where a file is cut short).
"""


class Store:
    """The files of a mixture, and the order of its rows."""

    def __init__(self, mixture: Mixture, sequence_length: int, seed: int, mode: Mode) -> None:
        if mode not in ("auto", "mmap", "pread"):
            raise ValueError(f"mode={mode!r}: must be 'auto', 'mmap' or 'pread'")
        self.mixture, self.sequence_length = mixture, sequence_length
        self.layouts = {c.name: open_layout(c.path, c.split, c.dtype) for c in mixture.components}
        for name, layout in self.layouts.items():
            if layout.tokens < sequence_length + 1:
                raise FormatError(
                    f"corpus {name!r} ({layout.path}) has {layout.tokens} tokens, fewer than one row of "
                    f"sequence_length={sequence_length} + 1; use a shorter sequence_length or a larger corpus"
                )
        mapped = mode == "mmap" or (mode == "auto" and sum(x.bytes for x in self.layouts.values()) <= MAPPED_BYTES)
        self.files = [open_file(layout, mapped=mapped) for layout in self.layouts.values()]
        self.order = _tokens.Order(
            corpora=[(_key(name), layout.tokens) for name, layout in self.layouts.items()],
            stages=mixture.schedule(),
            sequence_length=sequence_length,
            seed=seed,
        )

    def delimiters(self) -> list[int]:
        """The id between documents of each corpus. Raises FormatError for one that does not say it."""
        ids = []
        for component, layout in zip(self.mixture.components, self.layouts.values(), strict=True):
            delimiter = layout.delimiter if component.delimiter is None else component.delimiter
            if delimiter is None:
                raise FormatError(
                    f"corpus {component.name!r} ({layout.path}, {layout.format}) does not say which id is between its "
                    "documents: give Component(delimiter=...), or leave documents together"
                )
            ids.append(delimiter)
        return ids

    @property
    def fingerprints(self) -> dict[str, str]:
        """Component name -> digest of its content."""
        return {name: layout.fingerprint for name, layout in self.layouts.items()}

    def place(self, row: int) -> Place:
        """What row `row` of the stream holds."""
        corpus, rank, epoch, index, token = self.order.at(row)
        return Place(self.mixture.components[corpus].name, rank, epoch, index, token)


class Place(NamedTuple):
    """Where a row of the stream comes from."""

    corpus: str
    rank: int
    """Rows of this corpus before it in the stream."""
    epoch: int
    """Times the corpus was read whole before."""
    row: int
    """Which of the corpus's rows, in file order."""
    token: int
    """Its first token in the file."""


def open_file(layout: TokenLayout, *, mapped: bool) -> _tokens.TokenFile:
    """Open a layout's file. Raises OSError where it cannot be opened, FormatError where it is too short."""
    try:
        return _tokens.TokenFile(str(layout.path), layout.width, layout.offset, layout.tokens, mapped)
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def count_rows(path: Path | str, split: str, sequence_length: int, *, dtype: Dtype | None = None) -> int:
    """Rows that `sequential_rows` yields in all."""
    return max(0, (open_layout(path, split, dtype).tokens - 1) // sequence_length)


def sequential_rows(
    path: Path | str,
    split: str,
    sequence_length: int,
    *,
    batch: int = 1,
    start: int = 0,
    stop: int | None = None,
    dtype: Dtype | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows start ... stop - 1 of a split in file order, for a validation loss: each token is a label at most once.

    Yields (input_ids, labels), int64 (rows, sequence_length), `batch` rows at a time and the rest at the end; row i
    reads tokens [i L, i L + L]. Tokens after the last whole row are not read.
    Raises FormatError where the split has fewer than `stop` rows or not even one.
    """
    layout = open_layout(path, split, dtype)
    rows = max(0, (layout.tokens - 1) // sequence_length)
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows or rows == 0:
        raise FormatError(
            f"{layout.path} has {rows} rows of sequence_length={sequence_length}, asked for rows {start} to {stop}; "
            "ask for fewer rows or prepare a larger split"
        )
    file = open_file(layout, mapped=False)
    for first in range(start, stop, batch):
        count = min(batch, stop - first)
        raw = np.empty(count * sequence_length + 1, f"<u{layout.width}")
        file.read(first * sequence_length, raw.size, raw.ctypes.data)
        ids = torch.from_numpy(raw.astype(np.int64))
        yield ids[:-1].view(count, -1), ids[1:].view(count, -1)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

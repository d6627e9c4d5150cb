"""Corpora opened for reading: files checked, order known."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phi_fast._C import tokens as _tokens

from ..errors import MachineError
from .formats import Dtype, FormatError, TokenLayout, open_layout
from .mixture import Mixture

Mode = Literal["auto", "mmap", "pread"]
MAPPED_BYTES = 256 * 2**20
"""With mode="auto", corpora that together are larger are read instead of mapped.

A mapped row that was touched before costs one copy. One that was not costs page faults, and pages that were touched
count as the process's memory; handing them back makes the next touch a fault again. Measured on 4 KB rows in the page
cache, CPU time per row: mapped and touched 0.7 µs, mapped but not touched 3.8, handed back and touched again 9, read
with pread 2.4 (and nothing to hand back, and no signal where a file is cut short).
"""


class CorpusError(MachineError, RuntimeError):
    """A token file was cut short or changed while it was read, or holds ids it should not; the message names it."""


LARGEST_ID = 2**31 - 1

SAMPLED_BLOCKS = 64
"""Blocks of a file that are compared where its time of change is another: all of a corpus that has no more."""
SAMPLED_BYTES = 16384
"""Bytes of such a block where the format has no checksums of its own."""


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
        self._contents = [
            _Content(layout, file) for layout, file in zip(self.layouts.values(), self.files, strict=True)
        ]
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

    def recheck(self) -> bool:
        """Compare the content of files whose time of change is another since they were opened; equal ones are accepted.

        True where one was accepted. Raises RuntimeError for a file whose size or content changed. No thread may be
        reading meanwhile.
        """
        accepted = [content.recheck() for content in self._contents]
        return any(accepted)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Component name -> digest of its content."""
        return {name: layout.fingerprint for name, layout in self.layouts.items()}

    def place(self, row: int) -> Place:
        """What row `row` of the stream holds."""
        corpus, rank, epoch, index, token = self.order.at(row)
        return Place(self.mixture.components[corpus].name, rank, epoch, index, token)


class _Content:
    """Checksums of blocks of a token file, the manifest's or those it had when it was opened."""

    def __init__(self, layout: TokenLayout, file: _tokens.TokenFile) -> None:
        self._path, self._file, self._tokens, self._width = layout.path, file, layout.tokens, layout.width
        self._step = (layout.block_bytes if layout.sha256 else SAMPLED_BYTES) // layout.width
        blocks = -(-layout.tokens // self._step)
        count = min(blocks, SAMPLED_BLOCKS)
        self._sampled = [block * (blocks - 1) // max(count - 1, 1) for block in range(count)]
        self._stamp = file.change_stamp()
        self._sha256 = [layout.sha256[block] if layout.sha256 else self._digest(block) for block in self._sampled]

    def recheck(self) -> bool:
        """True where the file was touched and holds what it held. Raises RuntimeError where it does not."""
        stamp = self._file.change_stamp()
        if stamp == self._stamp:
            return False
        if [self._digest(block) for block in self._sampled] != self._sha256:
            raise CorpusError(
                f"{self._path} was changed while in use: its content is another, with as many bytes. Stop whatever "
                "writes to it and resume from a checkpoint"
            )
        self._file.accept(stamp)
        self._stamp = stamp
        return True

    def _digest(self, block: int) -> str:
        first = block * self._step
        data = np.empty(min(self._step, self._tokens - first), f"<u{self._width}")
        self._file.read(first, data.size, data)
        return hashlib.sha256(data.data).hexdigest()


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
        return _tokens.TokenFile(os.fsencode(layout.path), layout.width, layout.offset, layout.tokens, mapped)
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def count_rows(path: Path | str, split: str, sequence_length: int, *, dtype: Dtype | None = None) -> int:
    """Rows that `sequential_rows` yields in all."""
    return max(0, (open_layout(path, split, dtype).tokens - 1) // sequence_length)


def documents(input_ids: Tensor, delimiter: int) -> Tensor:
    """cu_seqlens of rows (batch, sequence_length), int32 (documents + 1,), as `TokenLoader` has it: a document begins
    with each row, and at each delimiter."""
    begins = input_ids == delimiter
    begins[:, 0] = True
    return torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([input_ids.numel()]))).int()


def sequential_rows(
    path: Path | str,
    split: str,
    sequence_length: int,
    *,
    batch: int = 1,
    start: int = 0,
    stop: int | None = None,
    dtype: Dtype | None = None,
    max_token_id: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows start ... stop - 1 of a split in file order, for a validation loss: each token is a label at most once.

    Yields (input_ids, labels), int64 (rows, sequence_length), `batch` rows at a time and the rest at the end; row i
    reads tokens [i L, i L + L]. Tokens after the last whole row are not read.
    max_token_id: the largest id that the model takes (its vocabulary less 1); no id may be above what the corpus's
    manifest says is its largest, either.

    Raises FormatError where the split has fewer than `stop` rows or not even one, CorpusError for a file that was cut
    short or has a larger id.
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
    largest = min(id for id in (layout.max_id, max_token_id, LARGEST_ID) if id is not None)
    for first in range(start, stop, batch):
        count = min(batch, stop - first)
        raw = np.empty(count * sequence_length + 1, f"<u{layout.width}")
        try:
            file.read(first * sequence_length, raw.size, raw)
        except RuntimeError as error:
            raise CorpusError(str(error)) from None
        if raw.max() > largest:
            at = int((raw > largest).argmax())
            raise CorpusError(
                f"{layout.path}: token {first * sequence_length + at} is id {raw[at]}, and ids up to {largest} were "
                f"expected: {_who_says(layout, largest)}"
            )
        ids = torch.from_numpy(raw.astype(np.int64))
        yield ids[:-1].view(count, -1), ids[1:].view(count, -1)


def _who_says(layout: TokenLayout, largest: int) -> str:
    if largest == layout.max_id:
        return "its manifest says so, so the file is damaged. Copy it again, or prepare the corpus again"
    return (
        "the model has no more. Use the tokenizer of the corpus and a model of its vocabulary, or copy the file again "
        "if it is damaged"
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

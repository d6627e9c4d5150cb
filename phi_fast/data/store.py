"""Opens corpora for reading: checks their files, and determines the order of rows."""

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
"""With mode="auto", corpora with a larger total size are read instead of mapped.

Reading a mapped row costs one copy if its pages were touched before, and page faults otherwise. Touched pages count as
the process's memory; after they are released, the next touch is a page fault again. CPU time per row, measured on 4 KB
rows in the page cache: mapped and touched 0.7 µs, mapped but not touched 3.8, released and touched again 9, read with
pread 2.4. pread also has nothing to release, and no signal if a file is cut short.
"""


class CorpusError(MachineError, RuntimeError):
    """A token file was cut short or changed while in use, or has ids that are too large; the message names it."""


LARGEST_ID = 2**31 - 1

SAMPLED_BLOCKS = 64
"""Maximum number of blocks of a file that are compared after its change time changed."""
SAMPLED_BYTES = 16384
"""Size of such a block if the format has no checksums of its own."""


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
        """The id between documents, for each corpus. Raises FormatError for a corpus that does not record it."""
        ids = []
        for component, layout in zip(self.mixture.components, self.layouts.values(), strict=True):
            delimiter = layout.delimiter if component.delimiter is None else component.delimiter
            if delimiter is None:
                raise FormatError(
                    f"corpus {component.name!r} ({layout.path}, {layout.format}) does not record which id is between "
                    "its documents: give Component(delimiter=...), or do not isolate documents"
                )
            ids.append(delimiter)
        return ids

    def recheck(self) -> bool:
        """Compare the content of files whose change time changed since they were opened, and accept equal ones.

        Returns whether any was accepted. Raises RuntimeError for a file whose size or content changed. No thread may
        read meanwhile.
        """
        accepted = [content.recheck() for content in self._contents]
        return any(accepted)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Component name -> digest of its content."""
        return {name: layout.fingerprint for name, layout in self.layouts.items()}

    def place(self, row: int) -> Place:
        """The place that row `row` of the stream comes from."""
        corpus, rank, epoch, index, token = self.order.at(row)
        return Place(self.mixture.components[corpus].name, rank, epoch, index, token)


class _Content:
    """Checksums of a token file's blocks, from its manifest or computed when it was opened."""

    def __init__(self, layout: TokenLayout, file: _tokens.TokenFile) -> None:
        self._path, self._file, self._tokens, self._width = layout.path, file, layout.tokens, layout.width
        self._step = (layout.block_bytes if layout.sha256 else SAMPLED_BYTES) // layout.width
        blocks = -(-layout.tokens // self._step)
        count = min(blocks, SAMPLED_BLOCKS)
        self._sampled = [block * (blocks - 1) // max(count - 1, 1) for block in range(count)]
        self._stamp = file.change_stamp()
        self._sha256 = [layout.sha256[block] if layout.sha256 else self._digest(block) for block in self._sampled]

    def recheck(self) -> bool:
        """True if the file was touched and its content is the same. Raises RuntimeError if its content changed."""
        stamp = self._file.change_stamp()
        if stamp == self._stamp:
            return False
        if [self._digest(block) for block in self._sampled] != self._sha256:
            raise CorpusError(
                f"{self._path} was changed while in use: its size is the same, its content is not. Stop whatever "
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
    """Origin of a row of the stream."""

    corpus: str
    rank: int
    """Number of rows of this corpus before it in the stream."""
    epoch: int
    """Number of times the entire corpus was read before."""
    row: int
    """Index of the row in the corpus, in file order."""
    token: int
    """Index of its first token in the file."""


def open_file(layout: TokenLayout, *, mapped: bool) -> _tokens.TokenFile:
    """Open a layout's file. Raises OSError if it cannot be opened, FormatError if it is too short."""
    try:
        return _tokens.TokenFile(os.fsencode(layout.path), layout.width, layout.offset, layout.tokens, mapped)
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def count_rows(path: Path | str, split: str, sequence_length: int, *, dtype: Dtype | None = None) -> int:
    """Total number of rows that `sequential_rows` yields."""
    return max(0, (open_layout(path, split, dtype).tokens - 1) // sequence_length)


def documents(input_ids: Tensor, delimiter: int) -> Tensor:
    """cu_seqlens, int32 (documents + 1,), for rows (batch, sequence_length), as in `TokenLoader`'s batches: a document
    begins at each row and at each delimiter."""
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
    """Yield rows start ... stop - 1 of a split in file order, for a validation loss: no token is a label twice.

    Yields (input_ids, labels), int64 (rows, sequence_length), `batch` rows at a time and the rest at the end; row i
    consists of tokens [i L, i L + L]. Tokens after the last complete row are not read.
    max_token_id: the largest id that the model accepts (its vocabulary less 1). An id above the manifest's max_id is an
    error as well.

    Raises FormatError if the split has fewer than `stop` rows or none, CorpusError for a file that was cut short or has
    a larger id.
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
        "the model's vocabulary ends there. Use the corpus's tokenizer and a model with its vocabulary, or copy the "
        "file again if it is damaged"
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

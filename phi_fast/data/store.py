"""Opens corpora for reading: checks their files, and determines the order of rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phi_fast._C import tokens as _tokens

from ..errors import MachineError
from .formats import Dtype, FormatError, TokenLayout, open_layout
from .manifest import BEGINS, TRAINED
from .mixture import Mixture
from .remote.cached_file import CachedFile
from .remote.opened import CachedRows, cached_marks, cached_tokens
from .remote_files import RemoteError

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
IGNORED = -100
"""Label of a token that does not count in the loss, as torch's cross_entropy has it."""

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
            check_rows(layout, sequence_length)
        mapped = mode == "mmap" or (mode == "auto" and sum(x.bytes for x in self.layouts.values()) <= MAPPED_BYTES)
        self.files = [open_file(layout, mapped=mapped) for layout in self.layouts.values()]
        self.marks = [open_marks(layout, mapped=mapped) for layout in self.layouts.values()]
        """The file of marks of each corpus, or None."""
        self._contents = []
        for layout, file, marks in zip(self.layouts.values(), self.files, self.marks, strict=True):
            self._contents.append(_Content(layout.path, file, layout.width, layout, layout.sha256))
            if layout.marks is not None and marks is not None:
                self._contents.append(_Content(layout.marks, marks, 1, layout, layout.marks_sha256))
        self.order = _tokens.Order(
            corpora=[(_key(name), layout.tokens) for name, layout in self.layouts.items()],
            stages=mixture.schedule(),
            sequence_length=sequence_length,
            seed=seed,
            packed=[bool(layout.row_tokens) for layout in self.layouts.values()],
        )
        remote = any(layout.url is not None for layout in self.layouts.values())
        self.cached = CachedRows(list(self.layouts.values()), self.order, sequence_length) if remote else None
        """What rows need of corpora that are cached; None if every corpus is complete."""

    def delimiters(self) -> list[int]:
        """The id between documents, for each corpus; -1 where marks say where they begin.

        Raises FormatError for a corpus that records neither.
        """
        ids = []
        for component, layout in zip(self.mixture.components, self.layouts.values(), strict=True):
            delimiter = layout.delimiter if component.delimiter is None else component.delimiter
            if layout.marks is not None:
                delimiter = -1  # its marks say where documents begin
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
    """Checksums of the blocks of a file of tokens or marks, from its manifest or computed when it was opened."""

    def __init__(
        self, path: Path, file: _tokens.TokenFile, width: int, layout: TokenLayout, sha256: tuple[str, ...]
    ) -> None:
        self._path, self._file, self._tokens, self._width = path, file, layout.tokens, width
        self._step = (layout.block_bytes if sha256 else SAMPLED_BYTES) // width
        blocks = -(-layout.tokens // self._step)
        count = min(blocks, SAMPLED_BLOCKS)
        self._sampled = [block * (blocks - 1) // max(count - 1, 1) for block in range(count)]
        self._stamp = file.change_stamp()
        self._sha256 = [sha256[block] if sha256 else self._digest(block) for block in self._sampled]

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
        cache = layout.url is not None
        return _tokens.TokenFile(
            os.fsencode(layout.path), layout.width, layout.offset, layout.tokens, mapped and not cache, cache
        )
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def open_marks(layout: TokenLayout, *, mapped: bool) -> _tokens.TokenFile | None:
    """Open a layout's marks; None if it has none. Raises as `open_file` does."""
    if layout.marks is None:
        return None
    try:
        cache = layout.marks_url is not None
        return _tokens.TokenFile(os.fsencode(layout.marks), 1, 0, layout.tokens, mapped and not cache, cache)
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def check_rows(layout: TokenLayout, sequence_length: int) -> None:
    """Raise FormatError if documents are packed into rows of another length than `sequence_length`."""
    if layout.row_tokens not in (0, sequence_length):
        raise FormatError(
            f"{layout.path} has its documents packed into rows of {layout.row_tokens} tokens, and sequence_length is "
            f"{sequence_length}: use --sequence-length {layout.row_tokens}, or prepare it again with --row-tokens "
            f"{sequence_length}"
        )


def count_rows(path: Path | str, split: str, sequence_length: int, *, dtype: Dtype | None = None) -> int:
    """Total number of rows that `sequential_rows` yields."""
    return max(0, (open_layout(path, split, dtype).tokens - 1) // sequence_length)


def documents(input_ids: Tensor, delimiter: int) -> Tensor:
    """cu_seqlens, int32 (documents + 1,), for rows (batch, sequence_length), as in `TokenLoader`'s batches: a document
    begins at each row and at each delimiter."""
    return _cumulative(input_ids == delimiter)


def _cumulative(begins: Tensor) -> Tensor:
    """cu_seqlens from bool (batch, sequence_length), True where a document begins; one also begins with each row."""
    begins[:, 0] = True
    return torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()]))).int()


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
    consists of tokens [i L, i L + L]. Labels that marks leave out of the loss are -100. Tokens after the last complete
    row are not read.
    max_token_id: the largest id that the model accepts (its vocabulary less 1). An id above the manifest's max_id is an
    error as well.

    Raises FormatError if the split has fewer than `stop` rows or none, CorpusError for a file that was cut short or has
    a larger id.
    """
    layout = open_layout(path, split, dtype)
    for rows in _rows(layout, sequence_length, batch, start, stop, max_token_id):
        yield rows[:2]


def isolated_rows(
    path: Path | str, split: str, sequence_length: int, *, batch: int, start: int, stop: int, max_token_id: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (input_ids, labels, cu_seqlens): `sequential_rows`, and where documents begin (see `documents`).

    cu_seqlens is None for a corpus that does not record where its documents begin.
    """
    layout = open_layout(path, split)
    for input_ids, labels, begins in _rows(layout, sequence_length, batch, start, stop, max_token_id):
        if begins is None:
            yield input_ids, labels, None if layout.delimiter is None else documents(input_ids, layout.delimiter)
        else:
            yield input_ids, labels, _cumulative(begins)


def _rows(
    layout: TokenLayout, sequence_length: int, batch: int, start: int, stop: int | None, max_token_id: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (input_ids, labels, begins), begins bool (rows, sequence_length) from the marks, or None without marks."""
    rows = max(0, (layout.tokens - 1) // sequence_length)
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows or rows == 0:
        raise FormatError(
            f"{layout.path} has {rows} rows of sequence_length={sequence_length}, asked for rows {start} to {stop}; "
            "ask for fewer rows or prepare a larger split"
        )
    check_rows(layout, sequence_length)
    file: _tokens.TokenFile | CachedFile = cached_tokens(layout) or open_file(layout, mapped=False)
    marks_file = cached_marks(layout) or open_marks(layout, mapped=False)
    largest = min(id for id in (layout.max_id, max_token_id, LARGEST_ID) if id is not None)
    for first in range(start, stop, batch):
        count = min(batch, stop - first)
        raw = _read(file, layout.width, first * sequence_length, count * sequence_length + 1, layout.offset)
        if raw.max() > largest:
            at = int((raw > largest).argmax())
            raise CorpusError(
                f"{layout.path}: token {first * sequence_length + at} is id {raw[at]}, and ids up to {largest} were "
                f"expected: {_who_says(layout, largest)}"
            )
        ids = torch.from_numpy(raw.astype(np.int64))
        if marks_file is None:
            yield ids[:-1].view(count, -1), ids[1:].view(count, -1), None
            continue
        marks = torch.from_numpy(_read(marks_file, 1, first * sequence_length, count * sequence_length + 1))
        labels = ids[1:].masked_fill((marks[1:] & TRAINED) == 0, IGNORED)
        yield ids[:-1].view(count, -1), labels.view(count, -1), ((marks[:-1] & BEGINS) != 0).view(count, -1)


def _read(
    file: _tokens.TokenFile | CachedFile, width: int, first: int, count: int, offset: int = 0
) -> np.ndarray[Any, Any]:
    """Read `count` tokens or marks from the `first` on. offset: bytes before the first one."""
    raw = np.empty(count, f"<u{width}")
    try:
        if isinstance(file, CachedFile):
            part = file.read(offset + first * width, offset + (first + count) * width)
            return np.frombuffer(part, raw.dtype).copy()
        file.read(first, raw.size, raw)
    except (RuntimeError, RemoteError) as error:
        raise CorpusError(str(error)) from None
    return raw


def _who_says(layout: TokenLayout, largest: int) -> str:
    if largest == layout.max_id:
        return "its manifest says so, so the file is damaged. Copy it again, or prepare the corpus again"
    return (
        "the model's vocabulary ends there. Use the corpus's tokenizer and a model with its vocabulary, or copy the "
        "file again if it is damaged"
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

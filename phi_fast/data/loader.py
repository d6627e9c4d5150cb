"""The training stream: batches of rows, prefetched by C++ threads. Its entire state is one integer."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from phi_fast._C import tokens as _tokens

from ..errors import MachineError
from .mixture import Mixture
from .remote.feed import Feed
from .remote_files import RemoteError
from .store import LARGEST_ID, CorpusError, Mode, Store

_TOUCHES = 100
"""Number of times that files may be touched while one batch is read."""
_CLOSED = "the loader is closed; make a new one"
LOOKAHEAD_ROWS = 128
"""Number of rows announced to the disk ahead of their read: as many requests as one NVMe drive handles at once."""


@dataclass(frozen=True)
class Batch:
    """One rank's rows. The loader reuses the memory once no tensor views it any more."""

    input_ids: Tensor
    """int64 (batch, sequence_length)."""
    labels: Tensor
    """int64 (batch, sequence_length): labels[b, t] is the token after input_ids[b, t], or -100 if it is not trained."""
    rows: range
    """Rows of the stream, one per batch row."""
    components: Tensor
    """int32 (batch,): for each row, the index of its corpus in the mixture's components."""
    positions: Tensor | None = None
    """int64 (batch, sequence_length), 0 at each document's start; None if documents are not isolated."""
    cu_seqlens: Tensor | None = None
    """int32 (segments + 1,): where documents start in the flattened (batch × sequence_length), and its end; None if
    documents are not isolated."""
    trained: int | None = None
    """Number of labels that are trained; None if no corpus of the mixture has marks, so that all are."""

    def to(self, device: torch.device) -> Batch:
        """The batch with its ids, labels and documents on a device. From page-locked memory the copy is asynchronous:
        that memory is torch's own, which is reused only after an event shows that the copy has read it."""
        moved = {name: getattr(self, name) for name in ("input_ids", "labels", "positions", "cu_seqlens")}
        there = {name: x.to(device, non_blocking=True) for name, x in moved.items() if x is not None}
        return replace(self, **there)


class TokenLoader:
    """An endless stream of batches from a mixture of corpora, with the same rows for any number of ranks and threads.

    The batches of all ranks together are rows g ... g + batch × world_size - 1 of the stream; rank r has the r-th
    `batch` of them. This also holds with gradient accumulation: with `batch` the micro-batch size, one optimizer step
    over all ranks uses the rows g ... g + global_batch - 1, however they are split.

    mixture: corpora and weights. sequence_length: L, tokens per row. batch: rows per rank in each batch.
    seed: random seed for the shuffle. threads: number of threads that fill batches; 0: `next` fills them. prefetch:
    number of batches filled ahead.
    mode: "mmap"; "pread", for network file systems; "auto": small corpora mapped, large ones read (store.MAPPED_BYTES).
    pin_memory: page-locked batches; None: if there is CUDA.
    document_isolation: batches have positions and cu_seqlens that restart at each delimiter (`<|endoftext|>`), or where
    marks say that a document begins.
    max_token_id: the largest id allowed (the model's vocabulary less 1), checked for every token that is read.

    Threads may share a loader: calls run one at a time, and each batch is returned once.

    A corpus may be a URL or a folder of `DataCache.corpus`: then the blocks of the next rows are fetched into a cache
    ahead of their use, and `next` waits for those that are not there yet.

    Raises FormatError, ManifestError or OSError for a corpus that cannot be read, ValueError for invalid arguments, and
    `next` raises CorpusError for files that are cut short or changed while in use, cannot be fetched, or have an id
    that is too large. A file whose change time differs but whose content is the same is accepted.
    """

    def __init__(
        self,
        mixture: Mixture,
        sequence_length: int,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        threads: int = 1,
        prefetch: int = 4,
        mode: Mode = "auto",
        pin_memory: bool | None = None,
        document_isolation: bool = False,
        max_token_id: int | None = None,
    ) -> None:
        for name, value, least in [
            ("sequence_length", sequence_length, 1),
            ("batch", batch, 1),
            ("world_size", world_size, 1),
            ("threads", threads, 0),
            ("prefetch", prefetch, 1),
        ]:
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be in 0 ... world_size - 1 = {world_size - 1}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: must be in 0 ... 2^64 - 1")
        self.batch, self.rank, self.world_size, self.seed = batch, rank, world_size, seed
        self.sequence_length, self.threads, self.prefetch = sequence_length, threads, prefetch
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory=True needs a CUDA device, and torch sees none: leave it None")
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.document_isolation = document_isolation
        self.store = Store(mixture, sequence_length, seed, mode)
        largest = LARGEST_ID if max_token_id is None else max_token_id
        for name, layout in self.store.layouts.items():
            if layout.max_id is not None and layout.max_id > largest:
                raise ValueError(
                    f"corpus {name!r} ({layout.path}) has token id {layout.max_id}, above the largest the model takes, "
                    f"{largest}: use the corpus's tokenizer or a model with a larger vocabulary"
                )
        delimiters = self.store.delimiters() if document_isolation else [-1] * len(self.store.layouts)
        marks = self.store.marks
        self._reader = _tokens.Reader(self.store.files, self.store.order, largest + 1, delimiters, marks)
        self._row = 0
        self._marked = any(file is not None for file in marks)
        self._ring = _Ring(batch, sequence_length, document_isolation, self.pin_memory, prefetch + 2)
        self._prefetcher: _tokens.Prefetcher | None = None
        self._finalizer: weakref.finalize | None = None
        self._feed: Feed | None = None
        if self.store.cached is not None:
            self.store.cached.window(batch, prefetch + 1)  # raises for a cache that is too small
        self._filling: deque[_Slot] = deque()
        self._closed = False
        self._lock, self._moving = threading.RLock(), False
        _LOADERS.add(self)

    @property
    def mixture(self) -> Mixture:
        return self.store.mixture

    @property
    def row(self) -> int:
        """First row of the next batch of all ranks: the entire state of the loader."""
        return self._row

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._alone():
            if self._closed or _python_ends:
                raise RuntimeError(_CLOSED)
            for _ in range(_TOUCHES):
                if self._prefetcher is None:
                    self._start()
                assert self._prefetcher is not None
                try:
                    self._submit_ready()
                    segments, trained = self._prefetcher.take()
                    if self._feed is None or self._feed.intact(self._first):
                        break
                    self._stop()  # another process removed a part of it from the cache: read it again
                except (MachineError, RemoteError) as error:
                    self._stop()
                    raise CorpusError(str(error)) from error
                except (RuntimeError, ValueError) as error:
                    self._stop()  # the batch was not returned: its rows are tried again, here or in the next call
                    if _python_ends:
                        raise RuntimeError(_CLOSED) from None
                    if not self._same_content():
                        raise CorpusError(str(error)) from error
                except BaseException:
                    self._stop()
                    raise
            else:
                raise CorpusError(
                    "a corpus's files are being written to, or removed from its cache, continually. Stop whatever does "
                    "it, or give a larger --data-cache-gb"
                )
            slot, first = self._filling.popleft(), self._first
            self._row += self.batch * self.world_size
            self._submit_ready(wait=False)
            return self._ring.lend(slot, range(first, first + self.batch), segments, trained if self._marked else None)

    def seek(self, row: int) -> None:
        """Let the next batch of all ranks start at row `row` of the stream. O(1)."""
        if not 0 <= row < 2**62:
            raise ValueError(f"row={row}: must be in 0 ... 2^62 - 1")
        with self._alone():
            self._stop()
            self._row = row

    def state_dict(self) -> dict[str, Any]:
        """The next row, and what identifies the stream; serialisable as JSON."""
        return {
            "row": self._row,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "mixture": self.mixture.hash,
            "corpora": self.store.fingerprints,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream at `state`, with any number of ranks and any batch size.

        Raises ValueError, naming what differs, if the stream would not be the same.
        """
        here = self.state_dict()
        for name, fingerprint in state["corpora"].items():
            found = here["corpora"].get(name)
            if found != fingerprint:
                where = f"at {self.store.layouts[name].path} " if found else ""
                raise ValueError(
                    f"corpus {name!r} {where}has fingerprint {found}, the checkpoint was made with {fingerprint}: "
                    "it is not the same data. Give the run its old corpus, or start a new run"
                )
        for field in ("seed", "sequence_length", "mixture"):
            if here[field] != state[field]:
                raise ValueError(
                    f"{field} is {here[field]} here and {state[field]} in the checkpoint: the data order would change. "
                    "Give the run its old value, or start a new run"
                )
        self.seek(state["row"])

    def close(self) -> None:
        """Stop the threads. Returned batches stay valid."""
        with self._alone():
            self._stop()
            self._closed = True
            if self._feed is not None:
                self._feed.close()

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock for a call that advances the stream. Calls from a signal handler raise RuntimeError: the
        handler runs inside the call that it interrupted, which holds a part of a batch."""
        with self._lock:
            if self._moving:
                raise RuntimeError(
                    "a signal's handler used the loader that the signal interrupted: let the handler set a flag, and "
                    "look at it after next()"
                )
            try:
                self._moving = True
                yield
            finally:
                self._moving = False

    def _after_fork(self) -> None:
        """Reset in a forked child: the threads, and the lock's holder, exist only in the parent."""
        self._lock, self._moving, self._feed = threading.RLock(), False, None
        if self.store.cached is not None:
            self.store.cached.open()
        self._stop()

    def _same_content(self) -> bool:
        """Whether reading stopped because a file was touched whose content is the same. Raises CorpusError if not."""
        try:
            return self.store.recheck()
        except RuntimeError as error:
            raise CorpusError(str(error)) from error

    def _start(self) -> None:
        self._filling.clear()
        stride = self.batch * self.world_size
        lookahead = max(self.prefetch, -(-LOOKAHEAD_ROWS // self.batch))
        self._prefetcher = _tokens.Prefetcher(self._reader, self.threads, stride, lookahead)
        self._finalizer = weakref.finalize(self, self._prefetcher.close)
        if _python_ends:  # since this call began
            self._stop()
            raise RuntimeError(_CLOSED)
        self._next_row = self._first
        if self.store.cached is not None:
            if self._feed is None:
                self._feed = self.store.cached.feed(self.batch, stride, self.prefetch + 1)
                weakref.finalize(self, self._feed.close)
            self._feed.start(self._next_row)

    @property
    def _first(self) -> int:
        """First row of this rank's next batch."""
        return self._row + self.rank * self.batch

    def _submit_ready(self, *, wait: bool = True) -> None:
        """Let the threads fill the next `prefetch` batches, except those of which a part is not in the cache yet.

        wait: for the first of them.
        """
        assert self._prefetcher is not None
        while len(self._filling) < self.prefetch:
            if self._feed is not None and not self._feed.ready(self._next_row, wait=wait and not self._filling):
                return
            slot = self._ring.take()
            self._filling.append(slot)
            self._prefetcher.submit(self._next_row, self.batch, *slot.buffers)
            self._next_row += self.batch * self.world_size

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._prefetcher = self._finalizer = None
        self._filling.clear()


_LOADERS: weakref.WeakSet[TokenLoader] = weakref.WeakSet()
_python_ends = False
_EXIT_SECONDS = 1.0
"""Time for the calls of other threads to return before Python ends."""


def _after_fork() -> None:
    for loader in list(_LOADERS):
        loader._after_fork()


def _at_exit() -> None:
    """Close all loaders for good: a daemon thread that continues to read would write to freed memory, and Python aborts
    if it finds one inside torch."""
    global _python_ends
    _python_ends = True
    for loader in list(_LOADERS):
        idle = loader._lock.acquire(timeout=_EXIT_SECONDS)
        if loader._prefetcher is not None:
            loader._prefetcher.close()
        if loader._feed is not None:
            loader._feed.close()
        if idle:
            loader._lock.release()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Slot:
    """Memory of one batch."""

    def __init__(self, batch: int, length: int, isolated: bool, pinned: bool) -> None:
        self.tokens = torch.empty(3 if isolated else 2, batch, length, dtype=torch.int64, pin_memory=pinned)
        self.components = torch.empty(batch, dtype=torch.int32)
        self.cu_seqlens = torch.empty(batch * length + 1 if isolated else 0, dtype=torch.int32)
        parts = [self.tokens[0], self.tokens[1], self.components]
        if isolated:
            parts += [self.tokens[2], self.cu_seqlens]
        self.buffers = [part.numpy() for part in parts]


class _Ring:
    """Slots that are filled, returned as batches, and reused once no tensor views them."""

    def __init__(self, batch: int, length: int, isolated: bool, pinned: bool, keep: int) -> None:
        self._shape, self._isolated, self._pinned = (batch, length, isolated, pinned), isolated, pinned
        self._free: deque[_Slot] = deque(maxlen=keep)

    def take(self) -> _Slot:
        return self._free.popleft() if self._free else _Slot(*self._shape)

    def lend(self, slot: _Slot, rows: range, segments: int, trained: int | None) -> Batch:
        if self._pinned:
            # torch's allocator reuses page-locked memory: it alone knows when a copy to the device, which may have been
            # started on any stream, has read all of it.
            tokens = slot.tokens
        else:
            # A tensor made from an array keeps the array until no tensor views its storage: then the slot is free.
            array = slot.tokens.numpy()
            tokens = torch.from_numpy(array)
            weakref.finalize(array, self._free.append, slot).atexit = False
        return Batch(
            input_ids=tokens[0],
            labels=tokens[1],
            rows=rows,
            components=slot.components.clone(),
            positions=tokens[2] if self._isolated else None,
            cu_seqlens=slot.cu_seqlens[: segments + 1].clone() if self._isolated else None,
            trained=trained,
        )

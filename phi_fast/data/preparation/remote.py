"""Remote inputs of `prepare`: files at a URL, which are read in place, without a copy on disk."""

from __future__ import annotations

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from ..remote_files import PATIENCE, Patience, RemoteStat, read_range

BLOCK_BYTES = 2**23
"""Bytes per request when a file is read from its beginning to its end."""
AHEAD = 3
"""Number of blocks that are requested before they are needed, each by a thread."""


@dataclass(frozen=True)
class RemotePath:
    """A file at a URL, with the methods of `pathlib.Path` that reading needs."""

    url: str
    size: int
    """Bytes, when the file was found."""
    version: str
    """What the server gave to recognise a change: see `remote_files.RemoteStat`."""
    patience: Patience = PATIENCE

    @staticmethod
    def of(url: str, stat: RemoteStat, patience: Patience = PATIENCE) -> RemotePath:
        return RemotePath(url, stat.size, stat.version, patience)

    def __str__(self) -> str:
        return self.url

    @property
    def _name(self) -> PurePosixPath:
        """The path in the URL, without a query."""
        return PurePosixPath(urlsplit(self.url).path or "/")

    @property
    def name(self) -> str:
        return self._name.name

    @property
    def suffix(self) -> str:
        return self._name.suffix

    def with_suffix(self, suffix: str) -> PurePosixPath:
        return self._name.with_suffix(suffix)

    def is_dir(self) -> bool:
        return False

    @property
    def stamp(self) -> tuple[str, int, str]:
        """What identifies the content, as far as the server tells."""
        return self.url, self.size, self.version

    def open(self, mode: str = "rb") -> Any:
        """Open for reading in any order: each `read` is one request. Raises RemoteError when it is read."""
        return _Ranges(self)

    def stream(self, start: int = 0) -> Any:
        """Open for reading from byte `start` to the end, with the next blocks requested ahead."""
        return io.BufferedReader(_Blocks(self, start), BLOCK_BYTES)

    def read_bytes(self) -> bytes:
        return read_range(self.url, 0, self.size, self.patience)

    def head(self, size: int) -> bytes:
        """The first bytes, requested once."""
        return _head(self, size)


AnyPath = Path | RemotePath


@lru_cache(maxsize=2**14)
def _head(path: RemotePath, size: int) -> bytes:
    return read_range(path.url, 0, min(size, path.size), path.patience)


class _Ranges(io.RawIOBase):
    """Random access: no buffer, since Parquet's reader asks for whole columns."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self._at = path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.path.size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self.path.size)
        data = read_range(self.path.url, self._at, stop, self.path.patience) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Blocks(io.RawIOBase):
    """Reads forward, with `AHEAD` blocks in flight. `tell` counts from the file's beginning."""

    def __init__(self, path: RemotePath, start: int) -> None:
        self.path = path
        self._at = self._asked = min(start, path.size)
        self._waiting = memoryview(b"")
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="phi_fast remote")
        self._blocks: deque[Future[bytes]] = deque()
        self._given_up = Event()

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        if not self._waiting:
            while len(self._blocks) < AHEAD and self._asked < self.path.size:
                stop = min(self._asked + BLOCK_BYTES, self.path.size)
                place = (self.path.url, self._asked, stop)
                self._blocks.append(self._pool.submit(read_range, *place, self.path.patience, self._given_up))
                self._asked = stop
            if not self._blocks:
                return 0
            self._waiting = memoryview(self._blocks.popleft().result())
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        self._at += size
        return size

    def close(self) -> None:
        self._given_up.set()  # else the end of the process would wait for the blocks' next attempts
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

"""A task: the part of the inputs that a worker reads and encodes at a time."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .inputs import Kind
from .remote import AnyPath, RemotePath


@dataclass(frozen=True)
class Task:
    """A part of the inputs."""

    kind: Kind
    paths: tuple[AnyPath, ...]
    """Text without `data`: complete files. Otherwise the one file or dataset."""
    size: int
    """Number of bytes on disk that the task covers, for the progress bar."""
    data: bytes | None = None
    """Text, lines: a part of the stream."""
    first: int = 0
    """Lines: the number of `data`'s first line. Parquet: the row group. Dataset: the first row."""
    last: int = 0
    """Dataset: the row after the last."""
    place: tuple[int, int] | None = None
    """A part of a remote stream: its first byte, decompressed, and the byte after its last; None for other tasks."""
    stream: Any = field(default=None, repr=False, compare=False)
    """A part of a remote stream whose `data` was not read: the `streams.Stream` to read it from."""

    def key(self, settings: bytes) -> bytes:
        """32 bytes that identify this task's documents, encoded with `settings`."""
        hashed = hashlib.blake2b(settings, digest_size=32)
        hashed.update(repr((self.kind, self.first, self.last)).encode())
        for path in self.paths:
            if isinstance(path, RemotePath):
                hashed.update(repr((path.stamp, self.place)).encode())
                continue
            hashed.update(os.fsencode(path.absolute()) + b"\0")
            if self.data is None:
                hashed.update(repr(_stamps(path)).encode())
        if self.place is None:
            hashed.update(self.data or b"")
        return hashed.digest()

    def loaded(self) -> Task:
        """This task with its data, for a worker. Raises RemoteError and PrepareError."""
        if self.place is None or self.data is not None:
            return replace(self, stream=None)
        return replace(self, data=self.stream.read(*self.place), stream=None)


def _stamps(path: Path) -> list[tuple[int, int]]:
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]

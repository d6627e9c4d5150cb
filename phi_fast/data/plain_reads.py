"""Reads arrays from files that may change meanwhile; never maps them.

The kernel kills a process that touches a map beyond the end of a truncated file (SIGBUS). A read returns less instead,
which is reported as an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UsageError

_Array = np.ndarray[Any, Any]


class CutShortError(UsageError):
    """A file is shorter than it should be; the message names it."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file without blocking. Raises OSError as `open` does, UsageError for another kind of file."""
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115, the caller's
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError(f"{path} is not a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_array(file: Path | BinaryIO, dtype: np.dtype[Any] | str, count: int, offset: int = 0) -> _Array:
    """Read (count,) items of `dtype` from byte `offset` on. Raises CutShortError if the file has fewer."""
    if isinstance(file, Path):
        with open_regular(file) as opened:
            return _read(opened, file, np.dtype(dtype), count, offset)
    return _read(file, file.name, np.dtype(dtype), count, offset)


def read_blocks(path: Path, dtype: np.dtype[Any] | str, count: int, offset: int, step: int) -> Iterator[_Array]:
    """Read `count` items of `dtype` from byte `offset` on, `step` items at a time. Raises CutShortError."""
    dtype = np.dtype(dtype)
    with open_regular(path) as file:
        for first in range(0, count, step):
            yield _read(file, path, dtype, min(step, count - first), offset + first * dtype.itemsize)


def _read(file: BinaryIO, path: Path | str, dtype: np.dtype[Any], count: int, offset: int) -> _Array:
    array = np.empty(count, dtype)
    file.seek(offset)
    place, view = 0, array.view(np.uint8).data
    while place < len(view):
        got = file.readinto(view[place:])  # type: ignore[attr-defined]
        if not got:
            raise CutShortError(
                f"{path} ends at byte {offset + place}, expected {count} {dtype.name} from byte {offset} on: "
                "it was cut short. Copy it again"
            )
        place += got
    return array

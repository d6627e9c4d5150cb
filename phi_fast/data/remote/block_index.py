"""Which blocks of a cached file are there: a memory-mapped array that the processes of one machine share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError

_MAGIC = 0x3158444950485031
_HEADER = np.dtype([("magic", "<u8"), ("block_bytes", "<u8"), ("size", "<u8"), ("evicting", "<u8")])
_BLOCK = np.dtype([("version", "<u4"), ("crc32", "<u4"), ("used_ns", "<u8")])


class BlockIndex:
    """State of the blocks of one file of `size` bytes, in blocks of `block_bytes`.

    version: uint32 (blocks,), odd while the block is there. It grows by 1 whenever the block is put in or removed, so a
    reader that finds the same odd number before and after a read has read the block itself, and no hole.
    crc32: uint32 (blocks,), of the block's bytes. used_ns: uint64 (blocks,), when it was last planned or read, in
    nanoseconds since 1970.

    Callers hold the cache's lock while they change version or crc32.
    """

    def __init__(self, path: Path, block_bytes: int, size: int) -> None:
        """Map the file of an index. Raises UsageError if it belongs to another file than expected, OSError."""
        self.path, self.block_bytes, self.size = path, block_bytes, size
        self.blocks = -(-size // block_bytes)
        expected = _HEADER.itemsize + self.blocks * _BLOCK.itemsize
        header = np.memmap(path, _HEADER, "r+", shape=(1,))
        found = (int(header["magic"][0]), int(header["block_bytes"][0]), int(header["size"][0]))
        if found != (_MAGIC, block_bytes, size) or path.stat().st_size != expected:
            raise UsageError(f"{path} is not the index of {size} bytes in blocks of {block_bytes}: remove its folder")
        self._header = header
        records: Any = np.memmap(path, _BLOCK, "r+", offset=_HEADER.itemsize, shape=(self.blocks,))
        records = records.view(np.ndarray)  # the same memory; a memmap takes several times as long to index
        self.version, self.crc32, self.used_ns = records["version"], records["crc32"], records["used_ns"]

    @staticmethod
    def create(path: Path, block_bytes: int, size: int) -> None:
        """Write the index of a file none of whose blocks is there."""
        header = np.array([(_MAGIC, block_bytes, size, 0)], _HEADER)
        with path.open("wb") as file:
            file.write(header.tobytes())
            file.truncate(_HEADER.itemsize + -(-size // block_bytes) * _BLOCK.itemsize)

    @staticmethod
    def open(path: Path) -> BlockIndex:
        """Map an index with what its header says. Raises UsageError if it is not an index, OSError."""
        if os.path.getsize(path) < _HEADER.itemsize:  # noqa: PTH202
            raise UsageError(f"{path} is not the index of a cached file: remove its folder")
        header = np.fromfile(path, _HEADER, 1)
        block_bytes, size = int(header["block_bytes"][0]), int(header["size"][0])
        if int(header["magic"][0]) != _MAGIC or not block_bytes:
            raise UsageError(f"{path} is not the index of a cached file: remove its folder")
        return BlockIndex(path, block_bytes, size)

    @property
    def present(self) -> np.ndarray[Any, Any]:
        """bool (blocks,): whether each block is there."""
        return (self.version & 1) == 1

    @property
    def bytes(self) -> int:
        """Bytes on disk, with every block counted in full."""
        return int(np.count_nonzero(self.version & 1)) * self.block_bytes

    @property
    def evicting(self) -> bool:
        """Whether blocks are being removed. If nobody holds the lock, a killed process has left some on disk."""
        return bool(self._header["evicting"][0])

    @evicting.setter
    def evicting(self, value: bool) -> None:
        self._header["evicting"][0] = value

    def touch(self, blocks: Any) -> None:
        """Note that blocks are about to be read or were read, so that others are removed before them."""
        self.used_ns[blocks] = time.time_ns()

    def span(self, block: int) -> tuple[int, int]:
        """First byte of a block, and the byte after its last."""
        return block * self.block_bytes, min(self.size, (block + 1) * self.block_bytes)

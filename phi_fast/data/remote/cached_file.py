"""One remote file of tokens or marks, and the local sparse file of the same size that holds some of its blocks."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MachineError
from ..remote_files import RemoteError, read_range
from .block_index import BlockIndex
from .cache import CacheFolder

_Versions = np.ndarray[Any, Any]


class CachedFile:
    """Blocks of the file at `url` in the sparse file at `path`, whose index lies beside it.

    sha256: hex digests of each `sha_bytes` bytes from byte `offset` up to byte `end`, from the manifest.

    A block's crc32 is checked when this process uses the block for the first time, so a block that a crash of the
    machine left half written is fetched again. As soon as all blocks of a digest are there, the digest is checked.
    Methods may be called from any thread.
    """

    def __init__(
        self,
        cache: CacheFolder,
        path: Path,
        url: str,
        sha256: Sequence[str] = (),
        sha_bytes: int = 0,
        offset: int = 0,
        end: int = 0,
    ) -> None:
        self.cache, self.path, self.url = cache, path, url
        self.index = BlockIndex.open(path.with_name(path.name + ".index"))
        self._sha256, self._sha_bytes, self._offset, self._end = sha256, sha_bytes, offset, end
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._checked = np.zeros(self.index.blocks, np.uint32)  # the version that was last known to be undamaged
        self._verified = np.zeros(len(sha256), bool)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def blocks(self, start: int, stop: int) -> range:
        """The blocks that hold bytes start ... stop - 1."""
        return range(start // self.index.block_bytes, -(-stop // self.index.block_bytes))

    def versions(self, blocks: range) -> _Versions | None:
        """uint32 (blocks,), the blocks' versions; None unless all are there and were checked by this process."""
        found = np.array(self.index.version[blocks.start : blocks.stop])
        ready = (found & 1).all() and (found == self._checked[blocks.start : blocks.stop]).all()
        return found if ready else None

    def unchanged(self, blocks: range, versions: _Versions) -> bool:
        """Whether no block was removed since `versions` was read, so that what was read meanwhile is no hole."""
        return bool((self.index.version[blocks.start : blocks.stop] == versions).all())

    def bring(self, blocks: range) -> None:
        """Make the blocks be there and checked. Another process may remove them again at any time.

        Raises RemoteError for blocks that cannot be fetched or have another digest than the manifest's, MachineError if
        they cannot be written.
        """
        self.index.touch(slice(blocks.start, blocks.stop))
        missing = [block for block in blocks if not self._check(block)]
        for first, last in _runs(missing):
            start, stop = self.index.span(first)[0], self.index.span(last - 1)[1]
            data = read_range(self.url, start, stop)
            self._publish(range(first, last), data)
        if missing:
            self._verify(blocks)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start ... stop - 1, fetched if they are not there. Raises as `bring` does."""
        blocks = self.blocks(start, stop)
        while True:
            if (versions := self.versions(blocks)) is None:
                self.bring(blocks)
                continue
            data = self._pread(start, stop)
            if self.unchanged(blocks, versions):
                self.index.touch(slice(blocks.start, blocks.stop))
                return data

    def _check(self, block: int) -> bool:
        """Whether a block is there and undamaged; a damaged one is removed."""
        version = int(self.index.version[block])
        if not version & 1:
            return False
        if self._checked[block] == version:
            return True
        data, expected = self._pread(*self.index.span(block)), int(self.index.crc32[block])
        if int(self.index.version[block]) != version:
            return False
        if zlib.crc32(data) == expected:
            self._checked[block] = version
            return True
        with self.cache.locked():
            if int(self.index.version[block]) == version:
                self.cache.drop(self.index, [block])
        return False

    def _publish(self, blocks: range, data: bytes) -> None:
        """Write blocks that were fetched, and then say that they are there; those that another process wrote first
        stay."""
        size, first = self.index.block_bytes, blocks.start * self.index.block_bytes
        with self.cache.locked():
            self.cache.make_room(len(blocks) * size)
            for block in blocks:
                if self.index.version[block] & 1:
                    continue
                start, stop = self.index.span(block)
                part = memoryview(data)[start - first : stop - first]
                self._pwrite(part, start)
                self.index.crc32[block] = zlib.crc32(part)
                self.index.version[block] += 1
                self._checked[block] = self.index.version[block]
                self.cache.count(size)

    def _verify(self, blocks: range) -> None:
        """Check the digests that lie in or beside these blocks and whose blocks are all there. Raises RemoteError."""
        if not len(self._sha256):
            return
        lowest = max(0, blocks.start * self.index.block_bytes - self._offset) // self._sha_bytes
        highest = max(0, blocks.stop * self.index.block_bytes - 1 - self._offset) // self._sha_bytes
        for i in range(lowest, min(highest + 1, len(self._sha256))):
            start = self._offset + i * self._sha_bytes
            stop = min(start + self._sha_bytes, self._end)
            of_digest = self.blocks(start, stop)
            if self._verified[i] or (versions := self.versions(of_digest)) is None:
                continue
            found = hashlib.sha256(self._pread(start, stop)).hexdigest()
            if not self.unchanged(of_digest, versions):
                continue
            if found != self._sha256[i]:
                with self.cache.locked():
                    self.cache.drop(self.index, list(of_digest))
                raise RemoteError(
                    f"{self.url}: bytes {start} to {stop - 1} have sha256 {found}, the manifest says "
                    f"{self._sha256[i]}: the file was damaged or replaced. Copy or prepare the corpus again, and "
                    "resume from a checkpoint before these rows were read"
                )
            self._verified[i] = True

    def _pread(self, start: int, stop: int) -> bytes:
        parts, at = [], start
        while at < stop:
            part = os.pread(self._descriptor, stop - at, at)
            if not part:
                raise MachineError(f"{self.path} was cut short at byte {at} of {self.index.size}: remove its folder")
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def _pwrite(self, part: memoryview, start: int) -> None:
        try:
            while part:
                written = os.pwrite(self._descriptor, part, start)
                part, start = part[written:], start + written
        except OSError as error:
            raise MachineError(
                f"{self.path} cannot be written ({error.strerror}): make room on its disk, or give less to "
                "--data-cache-gb, and go on from the newest checkpoint with --resume"
            ) from error


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of consecutive numbers, which ascend."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = runs[-1][0], block + 1
        else:
            runs.append((block, block + 1))
    return runs

"""A folder of cached blocks that the processes of one machine share, and whose size is bounded."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...files import file_lock, write_atomically, writing
from ...json_files import read_object
from .block_index import BlockIndex

BLOCK_BYTES = 2**16
"""Bytes that are fetched at once for one row, if they are not there. Rows are shuffled, so a row's neighbours are not
needed soon: a larger block would transfer more bytes per row, a smaller one would be requested as slowly."""
DEFAULT_GIGABYTES = 50.0
EVICTED_BYTES = 64 * 2**20
"""At least so much is removed at a time (at most 1/16 of the limit): choosing what to remove reads every index."""
PAGE_BYTES = 4096
"""Parts of a file are removed in multiples of its file system's blocks."""
FOLDER, GIGABYTES = "PHI_FAST_DATA_CACHE", "PHI_FAST_DATA_CACHE_GB"
"""Environment variables with the folder and the limit of `DataCache.default`."""
_KEEP_SIZE_PUNCH_HOLE = 3


class CacheFolder:
    """A folder that exists, with the limit that `DataCache` gave it.

    Processes may share it; a lock file protects every change. A killed process leaves nothing that must be repaired by
    hand: see `BlockIndex` and `CachedFile`.
    """

    def __init__(self, directory: Path) -> None:
        """Raises JsonFileError or OSError for a folder that is no cache."""
        self.directory = directory
        self.limit_bytes = read_object(directory / "limit.json", way_out="Remove the folder").whole("limit_bytes")
        self._thread_lock, self._lock = threading.Lock(), file_lock(directory / "lock")
        self._indexes: dict[Path, BlockIndex] = {}
        usage = directory / "usage"
        with contextlib.suppress(FileExistsError), usage.open("xb") as file:
            file.truncate(8)
        if usage.stat().st_size < 8:  # another process is between the two lines above
            os.truncate(usage, 8)
        self._usage = np.memmap(usage, "<u8", "r+", shape=(1,))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock: one thread of one process at a time. A kill of the process releases it."""
        with self._thread_lock:
            self._lock.acquire(poll_interval=0.002)
            try:
                yield
            finally:
                self._lock.release()

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks that are there."""
        return int(self._usage[0])

    def count(self, bytes: int) -> None:
        """Add blocks of so many bytes to the count (negative: remove). The lock is held."""
        self._usage[0] = max(0, self.used_bytes + bytes)

    def make_room(self, bytes: int) -> None:
        """Remove the blocks that were not used for longest until `bytes` more fit. The lock is held."""
        excess = self.used_bytes + bytes - self.limit_bytes
        if excess > 0:
            self._evict(excess + min(EVICTED_BYTES, self.limit_bytes // 16))

    def check_disk(self, bytes: int) -> None:
        """Raise UsageError if the disk has no room for what the cache may grow by, for `bytes` that are not there."""
        needed = max(0, min(bytes, self.limit_bytes - self.used_bytes))
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UsageError(
                f"{self.directory}: the cache may grow by {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB "
                f"left: give --data-cache-gb {max(0.1, (self.used_bytes + free) / 1e9 * 0.9):.1f}, or another folder "
                "with --data-cache"
            )

    def drop(self, index: BlockIndex, blocks: Sequence[int]) -> None:
        """Remove blocks of one file that are there. The lock is held."""
        blocks = [block for block in blocks if index.version[block] & 1]
        index.evicting = True
        index.version[blocks] += 1  # first: a reader that copied a hole sees that the version changed
        self.count(-len(blocks) * index.block_bytes)
        _punch(index.path.with_suffix(""), _runs(blocks), index.block_bytes)
        index.evicting = False

    def _evict(self, bytes: int) -> None:
        indexes = self._all_indexes()
        self._usage[0] = sum(index.bytes for index in indexes)
        owners, blocks, used, sizes = [], [], [], []
        for i, index in enumerate(indexes):
            there = np.flatnonzero(index.version & 1)
            owners.append(np.full(len(there), i))
            blocks.append(there)
            used.append(index.used_ns[there])
            sizes.append(np.full(len(there), index.block_bytes))
        oldest = np.argsort(np.concatenate(used), kind="stable") if used else np.empty(0, int)
        count = int(np.searchsorted(np.cumsum(np.concatenate(sizes)[oldest]), bytes)) + 1 if len(oldest) else 0
        owner, block = (np.concatenate(x)[oldest[:count]] if x else np.empty(0, int) for x in (owners, blocks))
        for i, index in enumerate(indexes):
            if len(mine := np.sort(block[owner == i])):
                self.drop(index, mine.tolist())

    def _all_indexes(self) -> list[BlockIndex]:
        for path in self.directory.glob("[!.]*/*.index"):
            if path not in self._indexes:
                self._indexes[path] = BlockIndex.open(path)
        return list(self._indexes.values())

    def _repair(self) -> None:
        """Count what is there, and remove what a process left that was killed while it removed blocks. The lock is
        held."""
        for index in self._all_indexes():
            if index.evicting:
                _punch(index.path.with_suffix(""), _runs(np.flatnonzero(~index.present)), index.block_bytes)
                index.evicting = False
        self._usage[0] = sum(index.bytes for index in self._all_indexes())


class DataCache(CacheFolder):
    """A folder with the blocks of remote token files, of at most `gigabytes` × 10⁹ bytes; made unless it exists.

    The limit belongs to the folder: the last process that opens it with a `DataCache` sets it.

    Raises UsageError for a folder that cannot be used and says why.
    """

    def __init__(
        self, directory: Path | str, gigabytes: float = DEFAULT_GIGABYTES, *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        if block_bytes < PAGE_BYTES or block_bytes % PAGE_BYTES:
            raise ValueError(f"block_bytes={block_bytes}: must be a multiple of {PAGE_BYTES}")
        if not 0 < gigabytes < math.inf:
            raise UsageError(f"data_cache_gb={gigabytes}: must be gigabytes, greater than 0")
        directory, self.block_bytes = Path(directory), block_bytes
        with writing(directory, "name another folder with --data-cache"):
            directory.mkdir(parents=True, exist_ok=True)
            _check_holes(directory)
            limit = json.dumps({"limit_bytes": int(gigabytes * 1e9)}).encode()
            write_atomically(directory / "limit.json", limit)
            super().__init__(directory)
            with self.locked():
                self._repair()

    @staticmethod
    def default() -> DataCache:
        """The cache of `default_folder` and `default_gigabytes`."""
        return DataCache(DataCache.default_folder(), DataCache.default_gigabytes())

    @staticmethod
    def default_folder() -> Path:
        """The folder that the environment variable PHI_FAST_DATA_CACHE names, else ~/.cache/phi_fast/data."""
        return Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "phi_fast" / "data")

    @staticmethod
    def default_gigabytes() -> float:
        """The limit that the environment variable PHI_FAST_DATA_CACHE_GB gives, else DEFAULT_GIGABYTES."""
        text = os.environ.get(GIGABYTES) or str(DEFAULT_GIGABYTES)
        try:
            return float(text)
        except ValueError:
            raise UsageError(f"{GIGABYTES}={text}: expected a number of gigabytes") from None


def _runs(blocks: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of consecutive numbers, which ascend."""
    array = np.asarray(blocks)
    if len(array):
        for run in np.split(array, np.flatnonzero(np.diff(array) != 1) + 1):
            yield int(run[0]), int(run[-1]) + 1


def _punch(path: Path, runs: Iterator[tuple[int, int]], block_bytes: int) -> None:
    """Give the disk space of runs of blocks back; they read as zeros afterwards. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for first, last in runs:
            _punch_hole(descriptor, first * block_bytes, (last - first) * block_bytes)
    finally:
        os.close(descriptor)


def _punch_hole(descriptor: int, start: int, length: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is None:
        raise OSError(errno.EOPNOTSUPP, "this system cannot remove parts of files")
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(descriptor, _KEEP_SIZE_PUNCH_HOLE, start, length):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _check_holes(directory: Path) -> None:
    """Raise UsageError if the folder's file system cannot remove parts of files."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(PAGE_BYTES))
        file.flush()
        try:
            _punch_hole(file.fileno(), 0, PAGE_BYTES)
        except OSError as error:
            raise UsageError(
                f"{directory}: its file system cannot remove parts of files ({error.strerror}), which a cache needs: "
                "name a folder on a local disk (ext4, XFS, Btrfs, tmpfs) with --data-cache"
            ) from error

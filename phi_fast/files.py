"""Writing files so that neither a crash, nor a full disk, nor a second process can spoil them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .errors import UsageError
from .json_files import JsonFileError, read_object

_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What file systems without flock answer: NFS without a lock daemon, some FUSE and parallel ones."""
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""What file systems without an fsync for directories answer (CIFS, some FUSE and shared folders): their renames are
as durable as they can be."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it holds all of `data` or what it held before, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Make what was written to a file last through a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make the renames done in `directory` last through a power loss, where its file system can."""
    if os.name != "posix":  # Windows cannot open a directory, and its renames are journalled
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def check_names(options: Any) -> None:
    """Raises UsageError where a path of a dataclass of options holds a NUL, which no system's call takes."""
    for field in fields(options):
        value = getattr(options, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and "\0" in str(path):
                raise UsageError(f"{field.name} {str(path)!r}: no file's name holds a NUL character; name another")


@contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Turn an OSError inside into a UsageError that names `path` and what to do: a full disk's own names no file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): {way_out}") from error


class Claim:
    """Exclusive ownership of a path by this process, through a lock file that outlives neither the process nor a kill.

    The kernel holds the lock where the file system has `flock`; elsewhere filelock's marker file does, which is broken
    when its process is gone. A file beside the lock says who holds it, for the message of whoever comes second.
    """

    def __init__(self, lock: BaseFileLock, holder: Path) -> None:
        self._lock, self._holder = lock, holder

    @staticmethod
    def take(
        lock_file: Path, what: str, *, wait: float = 0.0, tell: Callable[[str], None] | None = None, way_out: str = ""
    ) -> Claim:
        """Own `what` (for messages) from now on; waits up to `wait` seconds for another owner to end.

        tell: called once with a line that says for whom it waits, before it does.
        Raises UsageError, which names the owner and what to do, where it is taken still; OSError where the lock file
        cannot be made.
        """
        lock, holder = _lock(lock_file), lock_file.with_name(f"{lock_file.name}.holder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock's, where it falls back to a marker file
            try:
                lock.acquire(timeout=0)
            except Timeout:
                owner = _owner(holder)
                if wait and tell is not None:
                    tell(f"{what} is in use by {owner}; waiting up to {wait:.0f} s for it to end")
                try:
                    if not wait:
                        raise
                    lock.acquire(timeout=wait)
                except Timeout:
                    advice = way_out or "wait for it to end"
                    raise UsageError(
                        f"{what} is in use by {owner}: {advice}; if no such process runs, remove {lock_file}"
                    ) from None
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # the lock counts; this is for a message
            holder.write_text(json.dumps(me), encoding="utf-8")
        return Claim(lock, holder)

    def release(self) -> None:
        """Give the path up, and leave nothing of the claim beside or in it."""
        self._holder.unlink(missing_ok=True)
        if not isinstance(self._lock, SoftFileLock):  # a marker is removed by its own release
            # While it is held: who waits for this file looks whether it still has its name, and takes the new one.
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(file: Path) -> BaseFileLock:
    """The kernel's lock, or a marker file where the file system has none: filelock alone knows one of its answers."""
    probe = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return SoftFileLock(file, thread_local=False)
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
    return FileLock(file, thread_local=False)


def _owner(holder: Path) -> str:
    try:
        fields = read_object(holder, max_bytes=4096)
        return f"process {fields.whole('pid')} on {fields.text('host')} since {fields.text('since')}"
    except (OSError, JsonFileError):
        return "another process"

"""Writing of files so that neither a crash, nor a full disk, nor a second process can corrupt them."""

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
from typing import IO, Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .errors import UsageError
from .json_files import JsonFileError, read_object

_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""Errors of file systems without flock: NFS without a lock daemon, some FUSE and parallel file systems."""
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""Errors of file systems without fsync for directories (CIFS, some FUSE and shared folders)."""


@contextmanager
def replacing(path: Path, suffix: str = "partial") -> Iterator[IO[bytes]]:
    """Open a file to write that gets the name `path` only when it is complete and on disk; `sync_directory` is left to
    the caller.

    suffix: of its name until then, `.NAME.SUFFIX`. With the same suffix a resumed run overwrites what a kill left;
    processes that may write one path at a time need different ones.
    """
    temporary = path.with_name(f".{path.name}.{suffix}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it holds either all of `data` or its previous content, even after a crash."""
    with replacing(path, str(os.getpid())) as file:
        file.write(data)
    sync_directory(path.parent)


def check_begun(record: Path, plan: dict[str, Any], *, damaged: str, other: str) -> None:
    """Record what determines the work in a folder, or compare it with the record of when the work was begun.

    damaged: what to do about a record that cannot be read; other: what to name for other work. Raises UsageError naming
    what differs.
    """
    if not record.exists():
        write_atomically(record, json.dumps(plan).encode() + b"\n")
        return
    before = read_object(record, way_out=damaged).values
    changed = [name for name in plan if plan[name] != before.get(name)]
    if changed:
        raise UsageError(
            f"{record.parent} was begun with other {', '.join(changed)}: give what it was begun with to resume, or "
            f"name another {other}"
        )


def sync_file(path: Path) -> None:
    """Make a file's content survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Compute the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make the renames in `directory` survive a power loss, if its file system can."""
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
    """Raise UsageError if a path in a dataclass of options contains NUL, which no system call accepts."""
    for field in fields(options):
        value = getattr(options, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and "\0" in str(path):
                raise UsageError(f"{field.name} {str(path)!r}: no file's name can contain NUL; name another")


@contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Turn an OSError inside into a UsageError that names `path` and what to do (a full disk's error names no file)."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): {way_out}") from error


class Claim:
    """Exclusive ownership of a path by this process, through a lock file. A kill of the process releases it, too.

    The kernel holds the lock if the file system supports `flock`; elsewhere filelock's marker file is used, which
    counts only while its process lives. A file beside the lock names the owner, for the error message of another
    process.
    """

    def __init__(self, lock: BaseFileLock, holder: Path) -> None:
        self._lock, self._holder = lock, holder

    @staticmethod
    def take(
        lock_file: Path, what: str, *, wait: float = 0.0, tell: Callable[[str], None] | None = None, way_out: str = ""
    ) -> Claim:
        """Take the lock, waiting up to `wait` seconds for another owner to end.

        what: name of the locked thing in messages. tell: called once with a line that names the owner, before waiting.
        Raises UsageError, which names the owner and says what to do (`way_out`), if another process still holds the
        lock; OSError if the lock file cannot be made.
        """
        lock, holder = file_lock(lock_file), lock_file.with_name(f"{lock_file.name}.holder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock warns when it falls back to a marker file
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
        with suppress(OSError):  # only the lock matters; this file is for a message
            holder.write_text(json.dumps(me), encoding="utf-8")
        return Claim(lock, holder)

    def release(self) -> None:
        """Release the lock and remove its files."""
        self._holder.unlink(missing_ok=True)
        if not isinstance(self._lock, SoftFileLock):  # SoftFileLock removes its file itself
            # Removed while locked: a process that waits for this file sees that its name is gone and makes a new one.
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def file_lock(file: Path) -> BaseFileLock:
    """Make a kernel lock, or a marker file if the file system has no flock (filelock knows only one of the errors)."""
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

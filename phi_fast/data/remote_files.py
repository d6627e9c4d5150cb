"""Reads parts of files by URL (s3://, gs://, http(s)://, hf://, …) through fsspec, with retries and size checks."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import MachineError

ATTEMPTS = 10
"""Attempts per read before it counts as failed. With the waits between them they bridge half a minute."""
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""Seconds before the second attempt, which double with each further one, and their limit. Up to half of a wait is
taken off at random, so that many readers do not come back at once."""
TIMEOUT = 30.0
"""Seconds that one attempt may take, on the file systems whose calls can be cut off."""

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/{1,2}([^/].*)", re.DOTALL)
_DRIVES = {"file", "local"}
_TRANSPORTS = {
    "aiohttp",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "google",
    "huggingface_hub",
    "requests",
    "httpx",
    "urllib3",
}
"""Packages whose exceptions report a failed transfer."""
_PACKAGES = {
    **{"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"},
    **{"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"},
}

T = TypeVar("T")


class RemoteError(MachineError, OSError):
    """A remote file cannot be read; the message names the URL, the range, what was tried and what to do."""


class _ShortError(OSError):
    """A server sent another range than was asked for."""


class _NoRangesError(OSError):
    """A server does not serve parts of files."""


def url_of(path: Path | str) -> str | None:
    """The URL that `path` is; None for a local path.

    A Path keeps only one of the slashes in "s3://bucket/key"; it is put back.
    """
    match = _URL.fullmatch(str(path))
    return None if match is None or match[1] in _DRIVES else f"{match[1].lower()}://{match[2]}"


def read_range(url: str, start: int, stop: int) -> bytes:
    """Read bytes start ... stop - 1 of the file at `url`.

    Failed, timed-out and short answers are tried again, with exponentially growing waits, `ATTEMPTS` times in all.
    Raises RemoteError if the file does not exist, access is refused, a package is missing, or every attempt failed.
    """

    def attempt(fs: Any, path: str) -> bytes:
        if _is_http(url):
            data, _ = _call(fs, _get_range, fs, path, start, stop)
        else:
            data = bytes(_call(fs, "cat_file", path, start=start, end=stop))
        if len(data) != stop - start:
            raise _ShortError(f"the server sent {len(data)} bytes, asked for {stop - start}")
        return data

    return _retried(url, f"bytes {start} to {stop - 1}", attempt)


def size_of(url: str) -> int:
    """The size in bytes of the file at `url`. Raises RemoteError as `read_range` does, or if the server does not say."""

    def attempt(fs: Any, path: str) -> int:
        if _is_http(url):  # fsspec's own info() takes every failure for a missing file
            size = _call(fs, _get_range, fs, path, 0, 1)[1]
        else:
            size = _call(fs, "info", path).get("size")
        if not isinstance(size, int):
            raise _ShortError("the server does not say how large the file is")
        return size

    return _retried(url, "its size", attempt)


def exists(url: str) -> bool:
    """Whether there is a file at `url`. Raises RemoteError as `read_range` does, except for a missing file."""
    try:
        size_of(url)
    except RemoteError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


async def _get_range(fs: Any, url: str, start: int, stop: int) -> tuple[bytes, int | None]:
    """A part of a file over HTTP, and the size of the whole file. Raises as aiohttp does, or OSError."""
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as response:
        stated = re.fullmatch(r"bytes (?:\*|([0-9]+)-([0-9]+))/([0-9]+)", response.headers.get("Content-Range", ""))
        size = int(stated[3]) if stated else None
        if response.status == 416 and size == 0:
            return b"", 0
        if response.status in (404, 410):
            raise FileNotFoundError(url)
        response.raise_for_status()
        if response.status != 206:
            raise _NoRangesError(
                f"the server sent the whole file instead of a part of it, with status {response.status}"
            )
        if stated is None or stated[1] is None or int(stated[1]) != start:
            raise _ShortError(f"the server sent the range {response.headers.get('Content-Range')!r}")
        return await response.read(), size


def _call(fs: Any, what: str | Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a coroutine function, or a file system's method of that name; at most TIMEOUT seconds if asynchronous."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(fs, AsyncFileSystem):
        function = getattr(fs, f"_{what}") if isinstance(what, str) else what
        return sync(fs.loop, function, *arguments, timeout=TIMEOUT, **options)
    assert isinstance(what, str)
    return getattr(fs, what)(*arguments, **options)


def _retried(url: str, what: str, attempt: Callable[[Any, str], T]) -> T:
    """Call attempt(file system, path on it) until it succeeds, at most ATTEMPTS times."""
    fs, path = _open(url)
    wait = FIRST_WAIT
    for tried in range(1, ATTEMPTS + 1):
        try:
            return attempt(fs, path)
        except Exception as error:
            if (final := _final(error)) is not None:
                raise RemoteError(f"{url}: {what} cannot be read ({_line(error)}): {final}") from error
            if not _passing(error):
                raise
            if tried == ATTEMPTS:
                raise RemoteError(
                    f"{url}: {what} could not be read in {ATTEMPTS} attempts ({_line(error)}): check the network and "
                    "the server, then start again, with --resume if a run was saved"
                ) from error
        time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, which fsspec keeps for later calls, and the path on it. Raises RemoteError."""
    scheme = url.partition(":")[0]
    try:
        import fsspec
    except ImportError as error:
        raise RemoteError(f"{url} needs fsspec, which is not installed: pip install 'phi-fast[remote]'") from error
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "a package of fsspec")
        raise RemoteError(f"{url} needs {package}: pip install 'phi-fast[remote]' ({_line(error)})") from error
    except ValueError as error:
        raise RemoteError(f"{url}: {_line(error)}; expected s3://, gs://, http://, https:// or hf://") from error
    return fs, path


def _final(error: Exception) -> str | None:
    """What to do about an error that another attempt cannot mend; None for others."""
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return "there is no such file; correct the URL"
    status = getattr(error, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return "access is refused; give this machine credentials for it, or correct the URL"
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return "the server refuses the request; correct the URL"
    if isinstance(error, _NoRangesError):
        return "copy it to a server that answers range requests, or to this machine"
    return None


def _passing(error: Exception) -> bool:
    """Whether an error may pass: of the network, or of a server that is overloaded."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | EOFError) or bool(packages & _TRANSPORTS)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

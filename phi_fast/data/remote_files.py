"""Reads remote files (http, https, s3, gs, hf) in byte ranges through fsspec, with bounded retries.

The length of every answer is compared with the length asked for: an answer that is too short, as from a connection that
dropped, is fetched again and never accepted. Each failed attempt is named in the log `phi_fast.remote`, which prints to
stderr unless it is configured otherwise.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Event
from typing import Any, TypeVar

from ..errors import UsageError
from ..terminal import printable

_PACKAGES = {
    "http": ("fsspec", "aiohttp"),
    "https": ("fsspec", "aiohttp"),
    "s3": ("fsspec", "s3fs"),
    "gs": ("fsspec", "gcsfs"),
    "hf": ("fsspec", "huggingface_hub", "aiohttp"),
}
"""Scheme -> the packages that read it, all in the extra `remote`."""
SCHEMES = tuple(_PACKAGES)

_REFUSED = {400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 411, 412, 413, 414, 415, 416, 451, 501}
"""HTTP status codes that another attempt would not change."""

_VERSIONS = ("sha256", "ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "LastModified", "Last-Modified")
"""Names under which file systems give what recognises a version of a file."""

_IDENTITY = {"Accept-Encoding": "identity"}
"""Header that asks for bytes as they are stored: a part of a compressed answer would be another part."""

_log = logging.getLogger("phi_fast.remote")
_Result = TypeVar("_Result")


class RemoteError(UsageError):
    """A remote file cannot be read; the message names the URL, what was tried and what to do."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server."""

    attempts: int = 8
    """Attempts per request, the first included."""
    first_wait: float = 0.5
    """Seconds before the second attempt; each later wait is twice as long, shortened by up to half at random."""
    longest_wait: float = 60.0
    """Maximum seconds between two attempts."""
    timeout: float = 60.0
    """Seconds to wait for a connection, and for each next piece of an answer."""

    def wait(self, failures: int) -> float:
        """Seconds to wait after that many failed attempts (1 or more)."""
        return min(self.longest_wait, self.first_wait * 2 ** min(failures - 1, 32)) * random.uniform(0.5, 1)


PATIENCE = Patience()


@dataclass(frozen=True)
class RemoteStat:
    """What a server says about a file."""

    size: int
    """Bytes."""
    version: str
    """Changes when the content changes: a hash, an ETag or a modification time; "" if the server gives none."""


def is_url(text: str) -> bool:
    """Return whether the text names a remote file, in a scheme that this module reads."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in _PACKAGES


def read_range(url: str, start: int, stop: int, patience: Patience = PATIENCE, given_up: Event | None = None) -> bytes:
    """Read bytes `start` … `stop` - 1 of a remote file: exactly `stop - start` bytes, which must all exist.

    given_up: when it is set, by another thread, no further attempt is made.

    Raises RemoteError after `patience.attempts` failures, at once for an error that would not pass (missing file, no
    permission), and for a missing package.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"bytes {start} to {stop} of {url}: expected 0 <= start <= stop")
    if start == stop:
        return b""
    system, path = _open(url, patience)

    def fetch() -> bytes:
        data: bytes = (
            _cat_from_hub(system, path, start, stop, patience)
            if _of_hub(url)
            else system.cat_file(path, start=start, end=stop)
        )
        if len(data) > stop - start:
            raise _LastingError(f"the server sent {len(data):,} bytes: it answers no requests for a part of a file")
        if len(data) < stop - start:
            raise OSError(f"the answer has {len(data):,} bytes of {stop - start:,}")
        return data

    return retried(fetch, f"{url}, bytes {start:,} to {stop:,}", patience, given_up)


def stat(url: str, patience: Patience = PATIENCE) -> RemoteStat | None:
    """Ask for a file's size and version; None for a folder. Raises RemoteError as `read_range` does."""
    system, path = _open(url, patience)

    def ask() -> dict[str, Any]:
        try:
            found: dict[str, Any] = system.info(path)
        except FileNotFoundError as error:
            if not url.lower().startswith("http"):
                raise
            raise error.__cause__ or error from None  # fsspec takes every failure for a missing file
        return found

    info = retried(ask, url, patience)
    return None if info.get("type") == "directory" else _stat(url, info)


def find(url: str, patience: Patience = PATIENCE) -> dict[str, RemoteStat]:
    """List the files below a folder, or those that match a pattern with `*`: URL -> size and version, sorted by URL.

    Raises RemoteError as `read_range` does, and for http, which has no folders.
    """
    system, path = _open(url, patience)
    if url.lower().startswith("http"):
        raise RemoteError(f"{url}: over http only files can be read, since servers list no folders. Name each file")
    search = system.glob if "*" in path else system.find
    infos: dict[str, Any] = retried(lambda: search(path, detail=True), url, patience)
    files = {system.unstrip_protocol(name): info for name, info in infos.items() if info.get("type") != "directory"}
    return {name: _stat(name, files[name]) for name in sorted(files)}


def retried(
    call: Callable[[], _Result], what: str, patience: Patience = PATIENCE, given_up: Event | None = None
) -> _Result:
    """Call until it succeeds, waiting longer after each failure, which the log names.

    what: name of the request in messages, beginning with its URL. given_up: see `read_range`. Raises RemoteError.
    """
    given_up = given_up or Event()
    for attempt in range(1, patience.attempts + 1):
        try:
            return call()
        except UsageError:
            raise
        except Exception as error:  # each file system raises errors of its own libraries
            reason = describe(error)
            if (way_out := _lasting(error)) is not None:
                raise RemoteError(f"{printable(what)} cannot be read: {reason}. {way_out}") from error
            if attempt == patience.attempts or given_up.is_set():
                raise RemoteError(
                    f"{printable(what)} could not be read in {attempt} attempts: {reason}. Check the network and the "
                    "server, then run the same command again: what is done is kept"
                ) from error
            wait = patience.wait(attempt)
            _log.warning(
                "%s: attempt %d of %d failed (%s); trying again in %.1f s",
                *(printable(what), attempt, patience.attempts, reason, wait),
            )
            given_up.wait(wait)
    raise RemoteError(f"{what}: {patience.attempts} attempts, expected at least 1")


def describe(error: BaseException) -> str:
    """One line about an error, never empty: some libraries raise errors without a message, such as timeouts."""
    line = " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {line}" if line else type(error).__name__)[:300]


def _of_hub(url: str) -> bool:
    return url.lower().startswith("hf:")


def _cat_from_hub(system: Any, path: str, start: int, stop: int, patience: Patience) -> bytes:
    """Read from the Hugging Face hub over plain HTTP: the retries of its own client are not logged, and last long."""
    import huggingface_hub

    headers = {**huggingface_hub.utils.build_hf_headers(), **_IDENTITY}
    http = _file_system("https", patience.timeout, os.getpid())
    data: bytes = http.cat_file(system.url(path), start=start, end=stop, headers=headers)
    return data


class _LastingError(OSError):
    """An error that another attempt would not change."""


def _lasting(error: Exception) -> str | None:
    """What to do about an error that another attempt would not change; None if it may pass."""
    names = {kind.__name__ for kind in type(error).__mro__}
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "Check the address, and for hf:// the revision and, for a gated data set, your login (hf auth login)"
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        return "Set the credentials, such as AWS_ACCESS_KEY_ID; for public data, FSSPEC_S3_ANON=true reads without any"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "Check your credentials; public data on S3 is read without any with FSSPEC_S3_ANON=true"
    if isinstance(error, _LastingError):
        return "Download the file, and name its path here"
    known = {"InvalidURL", "ParamValidationError", "NotImplementedError", "TypeError"}
    if names & known or status in _REFUSED or getattr(error, "errno", None) == errno.EINVAL:
        return "Check the address; a file that changed or became shorter must be read from its beginning"
    return None


def _status(error: Exception) -> int | None:
    """HTTP status of an error from aiohttp, botocore, gcsfs, or huggingface_hub; None if it has none."""
    response = getattr(error, "response", None)
    candidates = [getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None)]
    return next((int(str(found)) for found in candidates if str(found).isdecimal()), None)


def _open(url: str, patience: Patience) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises RemoteError."""
    scheme = url.partition("://")[0].lower()
    if not is_url(url):
        raise RemoteError(f"{url!r} is no address that can be read: expected {', '.join(f'{s}://' for s in SCHEMES)}")
    if missing := [name for name in _PACKAGES[scheme] if importlib.util.find_spec(name) is None]:
        raise RemoteError(f"{url} needs {', '.join(missing)}: pip install 'phi-fast[remote]'")
    try:
        system = _file_system(scheme, patience.timeout, os.getpid())
        path: str = system._strip_protocol(url)
    except Exception as error:  # whatever a file system's constructor raises, for credentials and settings
        raise RemoteError(f"{url} cannot be opened: {describe(error)}") from error
    return system, path


@lru_cache(maxsize=8)
def _file_system(scheme: str, timeout: float, process: int) -> Any:
    """An fsspec file system that leaves retries to this module. fsspec's own settings (FSSPEC_S3_…) apply.

    process: id of this process, since a file system cannot be used after a fork.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options |= {"client_kwargs": {"timeout": limits}, "headers": _IDENTITY}
    elif scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "retries": {"max_attempts": 0},
        }
    elif scheme == "hf":
        del options["use_listings_cache"]
    system = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        system.retries = 1
    return system


def _stat(url: str, info: dict[str, Any]) -> RemoteStat:
    """What a file system's `info` says about a file. Raises RemoteError if it does not say the size."""
    if not isinstance(info.get("size"), int):
        raise RemoteError(f"{url}: the server does not say how long the file is. Download it, and name its path here")
    found = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return RemoteStat(info["size"], found)

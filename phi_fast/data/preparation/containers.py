"""Compressed files: recognised by name or content, read as one stream, with errors for damaged files."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from ...errors import UsageError
from ..plain_reads import open_regular
from ..signatures import HEAD_BYTES
from .remote import AnyPath, RemotePath

_MAGIC = {b"\x1f\x8b\x08": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_ZSTD_WINDOW = 2**31
"""Window size in bytes of `zstd --long=31`, the maximum."""
_ZSTD_READ = 2**14
"""Compressed bytes decompressed at once; zstd's maximum ratio limits the size of the result."""


class PrepareError(UsageError):
    """`prepare` cannot work with an input or an option; the message says what to do."""


def require(module: str, what: str) -> None:
    """Raise PrepareError unless the package is installed."""
    if importlib.util.find_spec(module) is None:
        raise PrepareError(f"{what} needs {module}, which is not installed: pip install 'phi-fast[prepare]'")


def compression(path: AnyPath) -> str | None:
    """The suffix of a file's compression, from its name or else its content; None if it is not compressed."""
    suffix = path.suffix.lower()
    if suffix in _OPENERS:
        return suffix
    with _beginning(path) as file:
        head = file.read(8)
    found = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)
    if found == ".bz2" and not (head[3:4].isdigit() and head[4:8] == b"1AY&"):
        return None  # a text that begins with BZh
    return found


def open_stream(raw: BinaryIO, path: AnyPath, suffix: str | None) -> Any:
    """Decompress `raw`: returns an object whose `read(n)` gives n bytes, or fewer at the end."""
    if suffix is None:
        return raw
    if suffix == ".zst":
        require("zstandard", f"{path} (Zstandard)")
    return _OPENERS[suffix](raw)


def read(stream: Any, size: int, path: AnyPath) -> bytes:
    """Read `size` bytes of a stream, or fewer at its end. Raises PrepareError for a damaged file."""
    try:
        data: bytes = stream.read(size)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise damaged(path, error) from error
    return data


def head(path: AnyPath, suffix: str | None) -> bytes:
    """The first bytes of a file, decompressed. Raises PrepareError for a damaged file."""
    with _beginning(path, suffix) as raw:
        return read(open_stream(raw, path, suffix), HEAD_BYTES, path)


def _beginning(path: AnyPath, suffix: str | None = None) -> BinaryIO:
    """Open a file of which the beginning is needed, decompressed from `suffix` by the caller."""
    if not isinstance(path, RemotePath):
        return open_regular(path)
    if suffix is None:
        return io.BytesIO(path.head(HEAD_BYTES))
    return io.BufferedReader(path.open(), 4 * HEAD_BYTES)


def damaged(path: AnyPath, error: Exception) -> PrepareError:
    return PrepareError(f"{path} is damaged: {str(error).strip().rstrip('.')}. Get the file again")


class _Zstandard(io.RawIOBase):
    """Reads the frames of a .zst file one after the other. (zstandard's own reader accepts truncated files.)

    Raises EOFError if the last frame is cut short, OSError if a frame is damaged.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of `buffer`. Returns the number of bytes written, 0 at the end."""
        while not self._waiting:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._raw.read(_ZSTD_READ)
            if self._frame is None or self._frame.eof:
                if not data:
                    return 0
                self._frame = self._decompressor.decompressobj()
            elif not data:
                raise EOFError("Truncated: it ends inside a frame")
            try:
                self._waiting = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size


def _zstandard(raw: BinaryIO) -> Any:
    return io.BufferedReader(_Zstandard(raw), 2**20)


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _zstandard,
    ".zstd": _zstandard,
}
COMPRESSED = tuple(_OPENERS)

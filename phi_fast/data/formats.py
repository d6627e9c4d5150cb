"""Opens token files of several formats: where their tokens lie, how wide they are, and other facts. Copies no token.

Supported formats: phi_fast's corpora, llm.c `.bin`, Megatron `.bin` + `.idx`, datatrove `.ds` + `.ds.index`, NumPy
`.npy`, and files without a header (nanoGPT's `.bin`, OLMo's and dolma's `.npy`, a `.ds` alone), whose dtype must be
given.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phi_fast._C import tokens as _tokens

from ..errors import UsageError
from .manifest import DTYPES, FILE_NAME, Manifest
from .plain_reads import open_regular
from .remote.mirror import remote_corpus
from .remote.origin import Origin, url_of
from .signatures import HEAD_BYTES, litdata_end, not_tokens

Dtype = Literal["uint16", "uint32"]
WIDTHS: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}

_LLMC_MAGICS = (20240520, 20240801)
_LARGEST_VOCABULARY = 2**24


class FormatError(UsageError):
    """A file cannot be read as tokens of its format; the message says why and what to do."""


@dataclass(frozen=True)
class TokenLayout:
    """Location and format of one split's tokens."""

    path: Path
    """The file that holds the tokens."""
    format: str
    """"phi_fast", "llm.c", "megatron", "datatrove", "npy" or "raw"."""
    dtype: Dtype
    """Always little-endian."""
    offset: int
    """Bytes before the first token."""
    tokens: int
    """Number of tokens in the file, including delimiters."""
    fingerprint: str
    """Hex digest that differs for different content; equal for copies of one corpus."""
    max_id: int | None = None
    """The largest id, if the format records it."""
    delimiter: int | None = None
    """The id between documents, if the format records it."""
    sha256: tuple[str, ...] = ()
    """Hex digest of each block of `block_bytes` bytes of tokens, if the format records it."""
    block_bytes: int = 0
    marks: Path | None = None
    """The file with the tokens' marks (`manifest.TRAINED`, `BEGINS`); None if every label trains."""
    marks_sha256: tuple[str, ...] = ()
    """Hex digest of each block of `block_bytes` bytes of marks."""
    row_tokens: int = 0
    """Length of the rows into which whole documents are packed; 0 if they are joined end to end."""
    url: str | None = None
    """URL of the token file if `path` is a cache of it, whose bytes are there only once they were fetched
    (`remote.opened`); None for a file that is complete."""
    marks_url: str | None = None
    """URL of the marks if `marks` is a cache of them."""

    @property
    def width(self) -> int:
        """Bytes per token."""
        return WIDTHS[self.dtype]

    @property
    def bytes(self) -> int:
        """Size of all tokens in bytes."""
        return self.tokens * self.width


def open_layout(path: Path | str, split: str = "train", dtype: str | None = None) -> TokenLayout:
    """The layout of `split` in the corpus at `path`: a corpus directory, or a token file, which is a single split.

    path: may be the URL of a corpus directory, which is then read through `DataCache.default()`.
    dtype: "uint16" or "uint32", required if the file does not record it, and otherwise checked.
    Raises FormatError, ManifestError or OSError, naming the file, what was found and what to do.
    """
    path = Path(path)
    if dtype is not None and dtype not in WIDTHS:
        raise FormatError(f"dtype={dtype!r} for {path}: must be one of {', '.join(map(repr, WIDTHS))}")
    if (url := url_of(path)) is not None:
        path = remote_corpus(url)
    layout = _our_layout(path, split) if path.is_dir() else _foreign_layout(path, dtype)
    if dtype is not None and dtype != layout.dtype:
        raise FormatError(f"{layout.path} ({layout.format}) has {layout.dtype} tokens, asked for dtype={dtype!r}")
    return layout


def _our_layout(directory: Path, split: str) -> TokenLayout:
    manifest = Manifest.read(directory)
    part, origin = manifest.split(split), Origin.read(directory)
    return TokenLayout(
        path=directory / part.file,
        format="phi_fast",
        dtype="uint16" if manifest.numpy_dtype.itemsize == 2 else "uint32",
        offset=part.offset,
        tokens=part.tokens,
        fingerprint=manifest.fingerprint(split),
        max_id=part.max_id,
        delimiter=manifest.delimiter.id if manifest.delimiter else None,
        sha256=part.sha256,
        block_bytes=part.block_bytes,
        marks=None if part.marks is None else directory / part.marks,
        marks_sha256=part.marks_sha256,
        row_tokens=part.row_tokens,
        url=None if origin is None else origin.file(part.file),
        marks_url=None if origin is None or part.marks is None else origin.file(part.marks),
    )


def _foreign_layout(path: Path, dtype: str | None) -> TokenLayout:
    if path.suffix == ".idx" or not path.exists():  # Megatron's tools name a dataset by the path without a suffix
        prefix = path.with_suffix("") if path.suffix == ".idx" else path
        path = prefix.with_name(prefix.name + ".bin")
        if not path.exists():
            raise FormatError(f"{prefix} does not exist; expected a corpus directory with {FILE_NAME}, or a token file")
    if not path.is_file():
        raise FormatError(f"{path} is not a regular file")
    size = path.stat().st_size
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    if not size:
        raise FormatError(f"{path} is empty. Copy or prepare it again")

    megatron, datatrove = path.with_suffix(".idx"), path.with_name(path.name + ".index")
    if megatron.exists() and _starts_with(megatron, b"MMIDIDX"):
        return _parsed(path, "megatron", size, megatron, lambda index: _tokens.parse_megatron(index, size))
    if path.suffix == ".ds" and datatrove.exists():
        return _parsed(path, "datatrove", size, datatrove, lambda index: _tokens.parse_datatrove(index, size))
    if head.startswith(b"\x93NUMPY"):
        return _parsed(path, "npy", size, head, lambda index: _tokens.parse_npy(index, size))
    if int.from_bytes(head[:4], "little") in _LLMC_MAGICS:
        return _parsed(path, "llm.c", size, head, lambda index: _tokens.parse_llmc(index, size))
    return _raw_layout(path, dtype, size, head)


def _starts_with(path: Path, magic: bytes) -> bool:
    with open_regular(path) as file:
        return file.read(len(magic)) == magic


def _parsed(
    path: Path, name: str, size: int, header: Path | bytes, parse: Callable[..., tuple[int, int, int, int]]
) -> TokenLayout:
    """The layout from a header, or from the index file that holds it.

    An index file is memory-mapped, since it may be gigabytes large; the parsers check each access, since the file may
    be cut short.
    """
    source = header if isinstance(header, Path) else path
    try:
        if isinstance(header, Path):
            with open_regular(header) as file:
                if not header.stat().st_size:
                    raise ValueError("it is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as index:
                    width, offset, tokens, _ = parse(index)
        else:
            width, offset, tokens, _ = parse(header)
    except ValueError as error:
        raise FormatError(f"{source} cannot be read as {name}: {error}") from None
    dtype: Dtype = "uint16" if width == 2 else "uint32"
    return TokenLayout(path, name, dtype, offset, tokens, _fingerprint(path, size))


def _raw_layout(path: Path, dtype: str | None, size: int, head: bytes) -> TokenLayout:
    """The layout of a file without a header. Its first tokens must look like the given dtype."""
    if (what := not_tokens(head, size, _u32_at(path, litdata_end(head)))) is not None:
        raise FormatError(f"{path} is {what}, not tokens: make tokens with `python -m phi_fast.prepare`")
    if dtype is None:
        raise FormatError(f"{path} has no header that records its dtype: give dtype='uint16' or 'uint32'")
    width = WIDTHS[dtype]
    if size % width:
        raise FormatError(f"{path} has {size} bytes, not a multiple of {dtype}'s {width}: was it cut short?")
    first = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    if width == 2 and first.size and first.any() and not (first >> 16).any():
        raise FormatError(f"{path} holds a 0 after every token if read as uint16: it is dtype='uint32'")
    if width == 4 and first.max() >= _LARGEST_VOCABULARY:
        raise FormatError(f"{path} starts with id {first.max()} if read as uint32: it is dtype='uint16', or not tokens")
    return TokenLayout(path, "raw", "uint16" if width == 2 else "uint32", 0, size // width, _fingerprint(path, size))


def _u32_at(path: Path, byte: int) -> int | None:
    with open_regular(path) as file:
        file.seek(byte)
        data = file.read(4)
    return int.from_bytes(data, "little") if len(data) == 4 else None


def _fingerprint(path: Path, size: int) -> str:
    """Digest of a file's size, beginning and end: fast for any size."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(HEAD_BYTES))
        file.seek(max(0, size - HEAD_BYTES))
        digest.update(file.read(HEAD_BYTES))
    return digest.hexdigest()

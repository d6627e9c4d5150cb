"""What a path names: where its tokens lie, how wide they are, and what is known of them. No token is copied.

Read as they are: our own corpora, llm.c `.bin`, Megatron `.bin` + `.idx`, datatrove `.ds` + `.ds.index`, NumPy `.npy`,
and files without a header (nanoGPT's `.bin`, OLMo's and dolma's `.npy`, a `.ds` alone), whose dtype must be said.
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

from .manifest import DTYPES, FILE_NAME, Manifest

Dtype = Literal["uint16", "uint32"]
WIDTHS: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}

_LLMC_MAGICS = (20240520, 20240801)
_HEAD_BYTES = 65536
"""Read from a file's start: more than any header needs."""
_LARGEST_VOCABULARY = 2**24
_NOT_TOKENS = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\x03\x04": "a zip archive",
    b"\x7fELF": "a program",
    b"MMIDIDX": "a Megatron index",
    b"mds\0": "a MosaicML shard",
}


class FormatError(ValueError):
    """A token file that cannot be read as what it is said to be; the message says why and what to do."""


@dataclass(frozen=True)
class TokenLayout:
    """Where one split's tokens lie."""

    path: Path
    """The file that holds the tokens."""
    format: str
    """Who wrote it: "phi_fast", "llm.c", "megatron", "datatrove", "npy" or "raw"."""
    dtype: Dtype
    """Always little-endian."""
    offset: int
    """Bytes before the first token."""
    tokens: int
    """Tokens in the file, delimiters included."""
    fingerprint: str
    """Hex digest that tells this content from another; equal for copies of one corpus."""
    max_id: int | None = None
    """The largest id, where the format records it."""
    delimiter: int | None = None
    """The id between documents, where the format records it."""

    @property
    def width(self) -> int:
        """Bytes a token."""
        return WIDTHS[self.dtype]

    @property
    def bytes(self) -> int:
        """Bytes of tokens."""
        return self.tokens * self.width


def open_layout(path: Path | str, split: str = "train", dtype: str | None = None) -> TokenLayout:
    """The layout of `split` of the corpus at `path`: a corpus directory, or a token file, which is one split itself.

    dtype: "uint16" or "uint32", needed only where the file does not say it, and checked where it does.
    Raises FormatError, ManifestError or OSError, naming the file, what was found and what to do.
    """
    path = Path(path)
    if dtype is not None and dtype not in WIDTHS:
        raise FormatError(f"dtype={dtype!r} for {path}: must be one of {', '.join(map(repr, WIDTHS))}")
    layout = _our_layout(path, split) if path.is_dir() else _foreign_layout(path, dtype)
    if dtype is not None and dtype != layout.dtype:
        raise FormatError(f"{layout.path} ({layout.format}) has {layout.dtype} tokens, asked for dtype={dtype!r}")
    return layout


def _our_layout(directory: Path, split: str) -> TokenLayout:
    manifest = Manifest.read(directory)
    part = manifest.split(split)
    return TokenLayout(
        path=directory / part.file,
        format="phi_fast",
        dtype="uint16" if manifest.numpy_dtype.itemsize == 2 else "uint32",
        offset=part.offset,
        tokens=part.tokens,
        fingerprint=manifest.fingerprint(split),
        max_id=part.max_id,
        delimiter=manifest.delimiter.id if manifest.delimiter else None,
    )


def _foreign_layout(path: Path, dtype: str | None) -> TokenLayout:
    if path.suffix == ".idx" or not path.exists():  # Megatron's own tools name a dataset by the path without suffix
        prefix = path.with_suffix("") if path.suffix == ".idx" else path
        path = prefix.with_name(prefix.name + ".bin")
        if not path.exists():
            raise FormatError(f"{prefix} does not exist; expected a corpus directory with {FILE_NAME}, or a token file")
    if not path.is_file():
        raise FormatError(f"{path} is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not size:
        raise FormatError(f"{path} is empty. Copy or prepare it again")

    megatron, datatrove = path.with_suffix(".idx"), path.with_name(path.name + ".index")
    if megatron.exists() and megatron.open("rb").read(7) == b"MMIDIDX":
        return _parsed(path, "megatron", size, megatron, lambda index: _tokens.parse_megatron(index, size))
    if path.suffix == ".ds" and datatrove.exists():
        return _parsed(path, "datatrove", size, datatrove, lambda index: _tokens.parse_datatrove(index, size))
    if head.startswith(b"\x93NUMPY"):
        return _parsed(path, "npy", size, head, lambda index: _tokens.parse_npy(index, size))
    if int.from_bytes(head[:4], "little") in _LLMC_MAGICS:
        return _parsed(path, "llm.c", size, head, lambda index: _tokens.parse_llmc(index, size))
    return _raw_layout(path, dtype, size, head)


def _parsed(
    path: Path, name: str, size: int, header: Path | bytes, parse: Callable[..., tuple[int, int, int, int]]
) -> TokenLayout:
    """The layout that a header, or the file that holds it, gives. An index is mapped: it may have gigabytes."""
    source = header if isinstance(header, Path) else path
    try:
        if isinstance(header, Path):
            with header.open("rb") as file:
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
    """A file of nothing but tokens. Its first tokens must look like the dtype that was asked for."""
    for magic, what in _NOT_TOKENS.items():
        if head.startswith(magic):
            raise FormatError(f"{path} is {what}, not tokens: make tokens with `python -m phi_fast.prepare`")
    if dtype is None:
        raise FormatError(f"{path} has no header that says how wide its tokens are: give dtype='uint16' or 'uint32'")
    width = WIDTHS[dtype]
    if size % width:
        raise FormatError(f"{path} has {size} bytes, not a multiple of {dtype}'s {width}: it was cut short, or not so")
    first = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    if width == 2 and first.size and first.any() and not (first >> 16).any():
        raise FormatError(f"{path} holds a 0 after every token if read as uint16: it is dtype='uint32'")
    if width == 4 and first.max() >= _LARGEST_VOCABULARY:
        raise FormatError(f"{path} starts with id {first.max()} if read as uint32: it is dtype='uint16', or no tokens")
    return TokenLayout(path, "raw", "uint16" if width == 2 else "uint32", 0, size // width, _fingerprint(path, size))


def _fingerprint(path: Path, size: int) -> str:
    """Digest of a file's size and both of its ends: cheap for any size."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        file.seek(max(0, size - _HEAD_BYTES))
        digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()

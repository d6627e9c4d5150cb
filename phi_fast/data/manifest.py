"""The manifest of a token corpus: describes the files on disk, which are checked before anything is read from them.

A corpus directory holds, for each split (`train`, and `validation` where there is one):

    manifest.json       this file's `Manifest`
    train.bin           the tokens, raw little-endian uint16 or uint32, documents one after the other
    train.ends          u64 little-endian, one per document: the offset in tokens after its last token or delimiter
    train.marks         only for conversations: one byte per token, whose bits are TRAINED and BEGINS

The manifest is written last and renamed into place, so a directory that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import write_atomically
from ..json_files import Fields, JsonFileError, read_json
from .plain_reads import CutShortError, read_array, read_blocks

FORMAT = "phi_fast tokens"
VERSION = 2
"""Version of a corpus with marks. A corpus without marks is written as version 1, which older versions read."""
TRAINED, BEGINS = 1, 2
"""Bits of a mark: the token is a label that counts in the loss; the token is the first of its document. Without marks
every label counts, and documents begin at delimiters."""
FILE_NAME = "manifest.json"
MAX_BLOCK_BYTES = 2**30
"""Maximum block size: an entire block is read into memory."""
MAX_MANIFEST_BYTES = 2**30
"""Maximum manifest size. A checksum per 16 MiB takes 70 bytes, so this is enough for 200 TB of tokens."""
BLOCK_BYTES = 16 * 2**20
"""Bytes of tokens per checksum in the corpora that `prepare` writes."""
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class ManifestError(JsonFileError):
    """A corpus directory is incomplete, damaged or not phi_fast's; the message says which file and what to do."""


@dataclass(frozen=True)
class Delimiter:
    """The token between documents."""

    id: int
    """Id of the token: for phi-1.5 `<|endoftext|>`, 50256."""
    side: Literal["before", "after"] = "after"
    """Whether the token is before or after each document. `prepare` writes it after; llm.c before."""


@dataclass(frozen=True)
class Split:
    """One token file and its document ends."""

    file: str
    """Token file, relative to the corpus directory."""
    ends: str
    """u64 cumulative document ends, relative to the corpus directory."""
    tokens: int
    """Number of tokens in the file, including delimiters."""
    documents: int
    """Number of documents in the file, and of entries in `ends`."""
    max_id: int
    """The largest token id in the file."""
    sha256: tuple[str, ...]
    """Hex digest of each block of `block_bytes` bytes of tokens; the last block may be shorter."""
    block_bytes: int = BLOCK_BYTES
    """Bytes of tokens per block."""
    offset: int = 0
    """Bytes before the first token; 0 except for an adopted file with a header."""
    adopted: bool = False
    """Whether `prepare --adopt` wrapped another program's file: `file` may lie outside the corpus directory then."""
    marks: str | None = None
    """File of marks, one byte per token, relative to the corpus directory; None if there are none."""
    marks_sha256: tuple[str, ...] = ()
    """Hex digest of each block of `block_bytes` bytes of marks."""
    row_tokens: int = 0
    """Length of the rows into which whole documents are packed, followed by one more token at the end of the file; 0 if
    documents are joined end to end."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a corpus directory."""

    dtype: str
    """"uint16" or "uint32", always little-endian."""
    tokenizer: str
    """Name or path of the tokenizer, as given to `prepare`."""
    tokenizer_sha256: str
    """Hex digest of the tokenizer's serialised JSON (`vocabulary.digest`): equal for equal tokenizers."""
    vocab_size: int
    """Size of the tokenizer's vocabulary, including added tokens; every id in the files is smaller."""
    delimiter: Delimiter | None
    """The token between documents; None if there is none."""
    splits: Mapping[str, Split]
    """Split name ("train", "validation") -> its files. A split without documents is left out."""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian numpy dtype of the token files."""
        return DTYPES[self.dtype]

    @property
    def marked(self) -> bool:
        """Whether a split has marks, so that some labels may not count in the loss."""
        return any(split.marks is not None for split in self.splits.values())

    def split(self, name: str) -> Split:
        """The split of that name. Raises ManifestError naming the existing splits."""
        if name not in self.splits:
            raise ManifestError(f"split {name!r} is not in this corpus, which has {', '.join(map(repr, self.splits))}")
        return self.splits[name]

    def fingerprint(self, split: str) -> str:
        """Hex sha256 of a split's content (dtype, sizes, checksums): equal for equal tokens in any directory."""
        part = self.split(split)
        content = [self.dtype, part.tokens, part.documents, part.block_bytes, *part.sha256]
        if part.marks is not None:
            content += [part.row_tokens, *part.marks_sha256]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write `directory`/manifest.json atomically: a reader never sees a partial file."""
        document = {"format": FORMAT, "version": VERSION if self.marked else 1, **asdict(self)}
        for split in document["splits"].values():
            for name in ("offset", "adopted", "marks", "marks_sha256", "row_tokens"):
                if not split[name]:
                    del split[name]
        write_atomically(directory / FILE_NAME, json.dumps(document, indent=1).encode() + b"\n")

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Read and `validate` the manifest of a corpus directory. Raises ManifestError."""
        path = Path(directory) / FILE_NAME
        try:
            document = read_json(path, max_bytes=MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise ManifestError(
                f"{path} does not exist: {directory} is not a complete corpus. Run `python -m phi_fast.prepare` to "
                "make one (an interrupted run resumes), or `--adopt` to wrap an existing token file"
            ) from None
        except (OSError, JsonFileError) as error:
            raise ManifestError(f"{path} cannot be read as JSON: {error}. Prepare the corpus again") from error
        manifest = parse_manifest(document, path)
        manifest.validate(directory)
        return manifest

    def validate(self, directory: Path) -> None:
        """Check the manifest against the files' sizes and last document ends, without reading tokens.

        Raises ManifestError naming the file, the value found, the expected value and the way out.
        """
        directory = Path(directory)
        for name, split in self.splits.items():
            width = self.numpy_dtype.itemsize
            _check_inside(directory, split)
            if split.max_id >= self.vocab_size:
                raise ManifestError(
                    f"{directory / FILE_NAME}: {name} has id {split.max_id}, and tokenizer {self.tokenizer!r} has only "
                    f"{self.vocab_size} ids: it was not made with this tokenizer. Prepare the corpus again"
                )
            _check_size(
                directory / split.file, split.offset + split.tokens * width, f"{split.tokens} {self.dtype} tokens"
            )
            _check_size(directory / split.ends, split.documents * 8, f"{split.documents} document ends")
            blocks = -(-split.tokens * width // split.block_bytes)
            if len(split.sha256) != blocks:
                raise ManifestError(
                    f"{directory / FILE_NAME}: {name} has {len(split.sha256)} checksums for {blocks} blocks of "
                    f"{split.block_bytes} bytes. Prepare the corpus again"
                )
            _check_marks(directory, name, split)
            last = int(read_array(directory / split.ends, "<u8", 1, 8 * (split.documents - 1))[0])
            if last != split.tokens:
                raise ManifestError(
                    f"{directory / split.ends}: the last document ends at token {last}, and {split.file} has "
                    f"{split.tokens}. Prepare the corpus again"
                )

    def verify(self, directory: Path) -> None:
        """`validate`, then read every token and check checksums, largest id and document ends. Raises ManifestError."""
        directory = Path(directory)
        self.validate(directory)
        for name, split in self.splits.items():
            path, largest = directory / split.file, 0
            step = split.block_bytes // self.numpy_dtype.itemsize
            blocks = read_blocks(path, self.numpy_dtype, split.tokens, split.offset, step)
            for block, (tokens, expected) in enumerate(zip(_intact(blocks), split.sha256, strict=True)):
                found = hashlib.sha256(tokens.data).hexdigest()
                if found != expected:
                    raise ManifestError(
                        f"{path}: block {block} (from byte {split.offset + block * split.block_bytes}) has sha256 "
                        f"{found}, the manifest says {expected}: the file is damaged. Copy or prepare it again"
                    )
                largest = max(largest, int(tokens.max()))
            if split.marks is not None:
                marks = _intact(read_blocks(directory / split.marks, "u1", split.tokens, 0, split.block_bytes))
                for block, (part, expected) in enumerate(zip(marks, split.marks_sha256, strict=True)):
                    if hashlib.sha256(part.data).hexdigest() != expected:
                        raise ManifestError(
                            f"{directory / split.marks}: block {block} does not have the manifest's sha256: the file "
                            "is damaged. Copy or prepare it again"
                        )
            if largest != split.max_id:
                raise ManifestError(f"{path}: the largest id of {name} is {largest}, the manifest says {split.max_id}")
            before = np.zeros(1, "<u8")
            for ends in _intact(read_blocks(directory / split.ends, "<u8", split.documents, 0, 2**20)):
                if (ends <= np.concatenate([before, ends[:-1]])).any():
                    raise ManifestError(
                        f"{directory / split.ends}: document ends do not ascend. Prepare the corpus again"
                    )
                before = ends[-1:]


def _intact(blocks: Iterator[np.ndarray[Any, Any]]) -> Iterator[np.ndarray[Any, Any]]:
    """The blocks of a file. Raises ManifestError if the file is cut short meanwhile."""
    try:
        yield from blocks
    except CutShortError as error:
        raise ManifestError(str(error)) from None


def _check_inside(directory: Path, split: Split) -> None:
    """Check that a manifest, which may be untrusted, names no files outside its directory. Raises ManifestError."""
    home = os.path.realpath(directory)
    inside = [split.ends, *([] if split.adopted else [split.file]), *([split.marks] if split.marks else [])]
    for name in inside:
        if os.path.commonpath([home, os.path.realpath(directory / name)]) != home:
            raise ManifestError(
                f"{directory / FILE_NAME}: {name!r} is outside {directory}. If the file is yours, wrap it with "
                "`python -m phi_fast.prepare --adopt FILE`; if a link leads there, put the file itself in its place"
            )


def _check_marks(directory: Path, name: str, split: Split) -> None:
    """Check what a split says about its marks and rows against its tokens. Raises ManifestError."""
    again = "Prepare the corpus again"
    if split.marks is not None:
        _check_size(directory / split.marks, split.tokens, f"{split.tokens} marks")
        if len(split.marks_sha256) != (blocks := -(-split.tokens // split.block_bytes)):
            raise ManifestError(
                f"{directory / FILE_NAME}: {name} has {len(split.marks_sha256)} checksums for {blocks} blocks of "
                f"marks. {again}"
            )
    if split.row_tokens and split.tokens % split.row_tokens != 1 % split.row_tokens:
        raise ManifestError(
            f"{directory / FILE_NAME}: {name} has {split.tokens} tokens, expected rows of {split.row_tokens} and one "
            f"more token. {again}"
        )


def _check_size(path: Path, expected: int, what: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ManifestError(
            f"{path}: {error.strerror}. The manifest says it holds {what}. Prepare the corpus again"
        ) from error
    if size != expected:
        raise ManifestError(
            f"{path} has {size} bytes, and {what} take {expected}: the file was "
            f"{'cut short' if size < expected else 'changed'}. Copy or prepare it again"
        )


def parse_manifest(document: Any, path: Path | str) -> Manifest:
    """Make a Manifest from JSON, checking the type and range of every field. path: its name in errors."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ManifestError(f"{path}: format is {found!r}, expected {FORMAT!r}: this is another program's file")
    if document.get("version") not in (1, VERSION):
        raise ManifestError(
            f"{path}: version is {document.get('version')!r}, this phi_fast reads 1 and {VERSION}; upgrade phi_fast"
        )
    values = Fields.of(document, str(path), "Prepare the corpus again", ManifestError)
    dtype = values.text("dtype")
    if dtype not in DTYPES:
        raise ManifestError(f"{path}: dtype is {dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")
    delimiter = None
    if document.get("delimiter") is not None:
        inner = values.inner("delimiter")
        side = inner.text("side")
        if side not in ("before", "after"):
            raise ManifestError(f"{path}: delimiter.side is {side!r}, expected 'before' or 'after'")
        delimiter = Delimiter(inner.whole("id"), "before" if side == "before" else "after")
    splits = values.inner("splits")
    if not splits.values:
        raise ManifestError(f"{path}: splits is empty, expected at least one split")
    return Manifest(
        dtype=dtype,
        tokenizer=values.text("tokenizer"),
        tokenizer_sha256=values.text("tokenizer_sha256"),
        vocab_size=values.whole("vocab_size", least=1),
        delimiter=delimiter,
        splits={name: _parse_split(splits.inner(name)) for name in splits.values},
    )


def _parse_split(values: Fields) -> Split:
    block_bytes = values.whole("block_bytes", least=4)
    if block_bytes % 4 or block_bytes > MAX_BLOCK_BYTES:
        values.refuse("block_bytes", f"a multiple of 4 of at most {MAX_BLOCK_BYTES}")
    return Split(
        file=values.text("file"),
        ends=values.text("ends"),
        tokens=values.whole("tokens", least=1),
        documents=values.whole("documents", least=1),
        max_id=values.whole("max_id"),
        sha256=values.texts("sha256"),
        block_bytes=block_bytes,
        offset=values.whole("offset") if "offset" in values else 0,
        adopted=values.flag("adopted") if "adopted" in values else False,
        marks=values.text("marks") if "marks" in values else None,
        marks_sha256=values.texts("marks_sha256") if "marks" in values else (),
        row_tokens=values.whole("row_tokens", least=1) if "row_tokens" in values else 0,
    )

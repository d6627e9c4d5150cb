"""Turns the files of a package into documents of plain text."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phi_fast.errors import UsageError

from .packages import Package, files

MAX_PACKAGE = 600_000
"""Bytes of text that a package of the raw draw may give, so that no single one dominates it."""
MIN_CHARACTERS = 200
"""Shorter documents are left out of every corpus."""
_NAMES = re.compile(r"^(changelog|changes|news|readme|todo|faq|copyright|authors|history|thanks|bugs|hacking)\b", re.I)
_SUFFIXES = {".html", ".htm", ".xhtml", ".txt", ".md", ".rst", ".text"}


@dataclass(frozen=True)
class Document:
    """One document: a file, or an entry of a dictionary or of a collection."""

    package: str
    path: str
    text: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


def read(package: Package, folder: Path) -> Iterator[Document]:
    """Yield the documents of a package, in the order of paths. Raises UsageError as `packages.files` does."""
    reader = READERS[package.format]
    total = 0
    for path, data in files(package, folder):
        for text in reader(path, data):
            text = clean(text)
            if len(text) < MIN_CHARACTERS and package.format == "document":
                continue
            document = Document(package.name, path, text)
            total += document.size
            if package.role == "raw" and total > MAX_PACKAGE:
                return
            if text:
                yield document


def clean(text: str) -> str:
    """Drop the spaces at the ends of lines, and all but two of several line breaks."""
    text = re.sub(r"[ \t\r\f]+\n", "\n", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _decode(data: bytes) -> str | None:
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _document(path: str, data: bytes) -> Iterator[str]:
    """Read documentation: HTML as text, and text by its usual names; other files give nothing."""
    name = PurePosixPath(path.removesuffix(".gz"))
    if name.suffix.lower() not in _SUFFIXES and not _NAMES.match(name.name):
        return
    text = _decode(data)
    if text is None:
        return
    yield _html(text) if name.suffix.lower() in {".html", ".htm", ".xhtml"} else text


def _html(text: str) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UsageError("the corpora's HTML is read by resiliparse: pip install 'phi-fast[textbooks]'") from error
    extracted: str = extract_plain_text(text, main_content=False, alt_texts=False)
    return extracted


def _text(path: str, data: bytes) -> Iterator[str]:
    text = _decode(data)
    if text is not None:
        yield text


def _dictd(path: str, data: bytes) -> Iterator[str]:
    """Read the entries of a dictd dictionary: a headword at the margin, then indented lines."""
    yield from re.split(r"\n\n(?=[^\s])", data.decode("utf-8", "replace"))


def _fortune(path: str, data: bytes) -> Iterator[str]:
    """Read the cookies of a fortune file as one document, without the `%` lines that separate them."""
    text = _decode(data)
    if text is not None:
        yield re.sub(r"\n%\n", "\n\n", text)


def _man(path: str, data: bytes) -> Iterator[str]:
    """Format a manual page as plain text, with groff's man macros. Raises UsageError if groff is not installed."""
    try:
        command = ["groff", "-k", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=100n"]
        done = subprocess.run(command, input=data, capture_output=True)
    except FileNotFoundError as error:
        raise UsageError("manual pages are formatted by groff: run `apt-get install groff-base`") from error
    yield done.stdout.decode("utf-8", "replace")


READERS: dict[str, Callable[[str, bytes], Iterator[str]]] = {
    "document": _document,
    "text": _text,
    "dictd": _dictd,
    "fortune": _fortune,
    "man": _man,
}
"""How the files of a package are read, by `Package.format`."""

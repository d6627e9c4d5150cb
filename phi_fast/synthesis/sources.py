"""Reads the topics and the web pages that prompts are made of."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..json_files import Fields, parse_lines, read_regular

MAX_BYTES = 2**30
"""Maximum size of a file of topics or pages, which is held in memory."""


def read_topics(path: Path) -> list[str]:
    """Read topics: one per line of text, or the field "topic" of each record of a .jsonl file; repeated ones once.

    Raises UsageError naming the line for a file that is not UTF-8 or JSON, and for one without topics.
    """
    found = _records(path, "topic") if path.suffix == ".jsonl" else _lines(path)
    topics = list(dict.fromkeys(topic for text in found if (topic := " ".join(text.split()))))
    if not topics:
        raise UsageError(f'{path} has no topics: expected one on each line, or JSONL with a field "topic"')
    return topics


def read_pages(path: Path, field: str = "text") -> list[str]:
    """Read web pages from the field `field` of a JSONL file. Raises UsageError as `read_topics` does."""
    pages = [text for text in _records(path, field) if text.strip()]
    if not pages:
        raise UsageError(f"{path} has no pages: expected JSONL with a field {field!r}, as `prepare` reads")
    return pages


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _lines(path: Path) -> list[str]:
    data = _read(path)
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line} is not UTF-8: save it as UTF-8") from None


def _records(path: Path, field: str) -> list[str]:
    texts = []
    for where, value in parse_lines(_read(path), str(path), whole=True):
        text = Fields.of(value, where).text(field)
        if not _is_unicode(text):
            raise UsageError(f"{where}: {field} has half a surrogate pair, which is not a character: correct the line")
        texts.append(text)
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

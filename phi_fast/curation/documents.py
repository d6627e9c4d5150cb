"""Documents of `curate`: what a record of JSON lines or of a table must hold, and how a document is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, NoReturn

from ..errors import UsageError

TEXT, ID, SCORES = "text", "id", "scores"
"""The fields of a written document; all others are the input's own."""


class CurateError(UsageError):
    """`curate` cannot work with an input or an option; the message says what to do."""


class MalformedError(ValueError):
    """A record is no document; the message says why."""


@dataclass(slots=True)
class Document:
    """One text with what is known about it. Steps may change the text and add scores."""

    text: str
    id: str
    """The record's own id, or "FILE:LINE"."""
    scores: dict[str, float] = field(default_factory=dict)
    """Name of a score -> its value, a finite number."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The record's other fields, which are written as they were read."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a document is left out."""

    reason: str
    """A short name, by which reports count."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What shows it, such as the id of the document that a duplicate repeats."""


def parse_line(line: bytes, text_field: str, place: str) -> Document:
    """Read one line of JSON. place: the document's id if it has none. Raises MalformedError."""
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode(), parse_constant=_no_constant)
        if b"\\u" in line:  # JSON can escape half a surrogate pair, in any field
            json.dumps(record, ensure_ascii=False).encode()
    except RecursionError:
        raise MalformedError("JSON that nests too deep") from None
    except UnicodeEncodeError:
        raise MalformedError("half of a surrogate pair, which is not Unicode text") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError, too; their messages may quote a whole line
        raise MalformedError(f"not JSON: {str(error)[:200]}") from None
    if not isinstance(record, dict):
        raise MalformedError(f"a JSON {type(record).__name__}, expected an object with a field {text_field!r}")
    return from_record(record, text_field, place)


def from_record(record: dict[str, Any], text_field: str, place: str) -> Document:
    """Make a document of a record's fields, of which it takes possession. Raises MalformedError."""
    if text_field not in record:
        fields = ", ".join(sorted(map(str, record)))[:200]
        raise MalformedError(f"no field {text_field!r} among {fields}; name the one with --text-field")
    text = record.pop(text_field)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise MalformedError(f"text that is not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(text, str):
        raise MalformedError(f"{text_field!r} is {type(text).__name__}, expected text")
    if TEXT in record:
        raise MalformedError(f"fields {text_field!r} and {TEXT!r}, of which the second is where texts are written")
    own, scores = record.pop(ID, None), record.pop(SCORES, None)
    if own is not None and not isinstance(own, str | int):
        raise MalformedError(f"{ID!r} is {type(own).__name__}, expected text or a whole number")
    return Document(text, place if own is None else str(own), _scores(scores), record)


def to_line(document: Document) -> bytes:
    """Write a document as one line of JSON. Raises MalformedError for metadata that JSON cannot hold."""
    fields = {TEXT: document.text, ID: document.id, SCORES: document.scores, **document.metadata}
    try:
        line = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), default=_plain, allow_nan=False)
        return line.encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedError(f"a field that JSON cannot hold: {str(error)[:200]}") from None


def _scores(value: Any) -> dict[str, float]:
    if isinstance(value, list):  # how pyarrow gives a map
        value = dict(value) if all(isinstance(item, tuple) and len(item) == 2 for item in value) else value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedError(f"{SCORES!r} is {type(value).__name__}, expected an object of numbers")
    for name, score in value.items():
        good = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if score is not None and not good:
            raise MalformedError(f"{SCORES!r} holds {str(name)[:80]!r}: {str(score)[:80]}, expected a finite number")
    return {str(name): score for name, score in value.items() if score is not None}


def _plain(value: Any) -> Any:
    """Turn a table's value into one of JSON."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

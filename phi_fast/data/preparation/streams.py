"""Cuts inputs that are read in sequence, text and lines, compressed or not, into tasks.

A remote input's cuts are written to a journal: after an interruption the parts whose units are complete are not read
again, and the others are the same parts as before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ...json_files import Fields, JsonFileError, read_lines
from ..vocabulary import END_OF_TEXT
from .containers import PrepareError, open_stream, read
from .inputs import Input
from .remote import RemotePath
from .task import Task

MAX_DOCUMENT_BYTES = 2**31
"""Maximum length of a document in a stream of text or lines."""
_SKIP_BYTES = 2**24


@dataclass(frozen=True)
class Cut:
    """One part of a decompressed stream."""

    start: int
    """Its first byte."""
    stop: int
    """The byte after its last."""
    first: int
    """Number of its first line, from 1."""
    lines: int
    """Its line feeds."""
    read: int
    """Bytes of the stream that were read when the cut was made."""
    size: int
    """Bytes of the file, as it is stored, that the part takes."""
    end: bool = False
    """Whether the stream ends here."""


_NUMBERS = ("start", "stop", "first", "lines", "read", "size")


class Journal:
    """The cuts of one remote input, in a file of JSON lines."""

    def __init__(self, folder: Path, entry: Input, unit_bytes: int) -> None:
        assert isinstance(entry.path, RemotePath)
        identity = repr((entry.path.stamp, entry.kind, entry.compression, unit_bytes))
        self._file = folder / "cuts" / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.jsonl"
        self.cuts: list[Cut] = []
        """The cuts made before; a line that an interruption cut short does not count."""
        with suppress(FileNotFoundError, JsonFileError):
            for where, value in read_lines(self._file):
                found = Fields.of(value, where)
                start, stop, first, lines, read, size = map(found.whole, _NUMBERS)
                self.cuts.append(Cut(start, stop, first, lines, read, size, found.flag("end")))
        self._file.parent.mkdir(exist_ok=True)
        write_atomically(self._file, b"".join(map(_line, self.cuts)))

    def add(self, cut: Cut) -> None:
        with self._file.open("ab") as file:
            file.write(_line(cut))


def _line(cut: Cut) -> bytes:
    return json.dumps(asdict(cut)).encode() + b"\n"


class Stream:
    """The decompressed bytes of an input, read forward; opened at the first read."""

    def __init__(self, entry: Input) -> None:
        self._entry, self._at = entry, 0
        self._raw: Any = None
        self._stream: Any = None

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop) or fewer at the end. Raises PrepareError for a damaged file, RemoteError."""
        if self._raw is None or start < self._at:
            self._open(start)
        while self._at < start and (skipped := len(self._next(min(_SKIP_BYTES, start - self._at)))):
            assert skipped
        return self._next(stop - start)

    def position(self) -> int:
        """Bytes of the file, as it is stored, that were read."""
        return int(self._raw.tell()) if self._raw is not None else 0

    def close(self) -> None:
        if self._raw is not None:
            self._raw.close()
            self._raw = None

    def _open(self, start: int) -> None:
        self.close()
        path, packed = self._entry.path, self._entry.compression
        if isinstance(path, RemotePath):
            self._at = 0 if packed else start
            self._raw = path.stream(self._at)
        else:
            self._at = 0
            self._raw = path.open("rb")
        self._stream = open_stream(self._raw, path, packed)

    def _next(self, size: int) -> bytes:
        data = read(self._stream, size, self._entry.path)
        self._at += len(data)
        return data


def cut_stream(entry: Input, unit_bytes: int, work: Path | None) -> Iterator[Task]:
    """Cut a stream into tasks of about `unit_bytes` bytes. work: directory for the journal of a remote input."""
    remote = isinstance(entry.path, RemotePath)
    journal = Journal(work, entry, unit_bytes) if remote and work is not None else None
    find_end = _after_last_line if entry.kind == "lines" else _before_last_separator
    stream = Stream(entry)

    def task(cut: Cut, data: bytes | None) -> Task:
        place = (cut.start, cut.stop) if remote else None
        return Task(entry.kind, (entry.path,), cut.size, data, cut.first, place=place, stream=stream)

    try:
        start, line, done, place = 0, 1, 0, 0
        for cut in journal.cuts if journal else ():
            if cut.stop > cut.start:
                yield task(cut, None)
            start, line, done, place = cut.stop, cut.first + cut.lines, cut.read, place + cut.size
            if cut.end:
                return
        pending = bytearray(stream.read(start, done) if done > start else b"")

        def make(end: int, *, last: bool) -> Task:
            nonlocal start, line, place
            lines = pending.count(b"\n", 0, end)
            stored = entry.size if last else stream.position()
            cut = Cut(start, start + end, line, lines, done, stored - place, last)
            if journal:
                journal.add(cut)
            start, line, place = cut.stop, line + lines, stored
            data = bytes(pending[:end])
            del pending[:end]
            return task(cut, data)

        while data := stream.read(done, done + unit_bytes):
            searched = max(0, len(pending) - len(END_OF_TEXT))  # there is no complete delimiter before this
            pending += data
            done += len(data)
            end = find_end(pending, searched)
            if end > 0:
                yield make(end, last=False)
            elif len(pending) > MAX_DOCUMENT_BYTES:
                raise PrepareError(
                    f"{entry.path}: a document is longer than {MAX_DOCUMENT_BYTES} bytes. Put {END_OF_TEXT} between "
                    "documents, or give them as JSONL"
                )
        if pending:
            yield make(len(pending), last=True)
        elif journal:
            journal.add(Cut(start, start, line, 0, done, 0, True))
    finally:
        stream.close()


def _after_last_line(data: bytearray, start: int) -> int:
    return data.rfind(b"\n", start) + 1


def _before_last_separator(data: bytearray, start: int) -> int:
    at = data.rfind(END_OF_TEXT.encode(), start)
    return at - 1 if at > 0 and data[at - 1 : at] == b"\n" else at

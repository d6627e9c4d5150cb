"""The journal: every answer of the server, appended and synced as it comes, so that no kill loses a finished one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ..json_files import Fields, parse_json

_WAY_OUT = "The journal was changed by something else: restore it, or name another --out"
_PIECE = 2**20

Kind = Literal["completed", "refused"]


@dataclass(frozen=True)
class Answer:
    """What the server made of one prompt."""

    number: int
    """Number of the prompt."""
    kind: Kind
    """Refused: the server answered that it does not carry out this request (a status of 400, 413 or 422)."""
    text: str
    """The completion; of a refusal, the server's message."""
    finish: str
    """Why the completion ended, in the server's word: "stop", "length"…"""
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Journal:
    """Appends answers to a file, each synced before `append` returns.

    Opening cuts off a last line that a kill left incomplete. Use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises OSError."""
        self.path = path
        self._file = path.open("a+b")
        whole = _whole_bytes(path)
        if whole < path.stat().st_size:
            self._file.truncate(whole)
            os.fsync(self._file.fileno())

    def append(self, answer: Answer) -> int:
        """Write one answer and sync it. Returns the byte offset of its line.

        Raises OSError, for example on a full disk; all lines before are still readable.
        """
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(asdict(answer)).encode() + b"\n")  # ASCII: half a surrogate pair is escaped
        self._file.flush()
        os.fsync(self._file.fileno())
        return place

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._file.close()


def read_journal(path: Path) -> Iterator[tuple[int, Answer]]:
    """Yield (byte offset of the line, answer) for each line. Raises UsageError naming a line that is not an answer."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):  # otherwise a kill cut it short
                yield place, _parse(line, f"{path}:{number}")
            place += len(line)


def read_answer(path: Path, offset: int) -> Answer:
    """Read the answer whose line begins at a byte offset that `read_journal` gave."""
    with path.open("rb") as file:
        file.seek(offset)
        return _parse(file.readline(), f"{path}, byte {offset}")


def _parse(line: bytes, where: str) -> Answer:
    fields = Fields.of(parse_json(line, where), where, _WAY_OUT)
    kind: Any = fields.text("kind")
    if kind not in ("completed", "refused"):
        fields.refuse("kind", '"completed" or "refused"')
    return Answer(
        fields.whole("number"),
        kind,
        fields.text("text"),
        fields.text("finish"),
        fields.whole("prompt_tokens"),
        fields.whole("completion_tokens"),
    )


def _whole_bytes(path: Path) -> int:
    """Number of bytes up to the last line feed."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _PIECE)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0

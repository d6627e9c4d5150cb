"""Saves the model's answers on disk as they come, so that a stopped evaluation can resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_atomically
from ..json_files import Fields, JsonFileError, read_lines

MAX_BYTES = 2**32
"""Maximum size of a file of answers."""


class Responses:
    """Answers in a JSON-lines file, by the hash of the request. The first line identifies the model.

    With path=None nothing is saved. Raises UsageError if the file has another model's answers.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read(path, fingerprint)
        else:
            write_atomically(path, f"{json.dumps({'model': fingerprint})}\n".encode())

    @staticmethod
    def key(*request: Any) -> str:
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Any:
        return self.known[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Append answers to the file: the operating system has them when this returns."""
        self.known.update(answers)
        if self.path is not None and answers:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, answer]) + "\n" for key, answer in answers.items())

    def _read(self, path: Path, fingerprint: str) -> None:
        lines = read_lines(path, max_bytes=MAX_BYTES)
        try:
            found = Fields.of(*reversed(next(lines))).text("model")
        except (StopIteration, JsonFileError) as error:
            raise UsageError(f"{path} is not a file of answers: name another --out, or delete it") from error
        if found != fingerprint:
            raise UsageError(
                f"{path} holds the answers of another model ({found}; this one is {fingerprint}); name another --out, "
                "or delete it"
            )
        self.known.update(_answer(where, value) for where, value in lines)
        _cut_torn_line(path)


def _answer(where: str, value: Any) -> tuple[str, Any]:
    """The key and the answer of a line. An answer is [log-likelihood, greedy], a text, or a program's outcome."""
    match value:
        case [str(key), str() | [int() | float(), bool()] as found]:
            return key, found
        case [str(key), {"passed": bool(), "reason": str(), "output": str(), "seconds": int() | float()} as found]:
            if len(found) == 4:
                return key, found
    raise UsageError(f"{where} is not an answer: remove that line, and its question is asked again")


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a process that was stopped, so that the next answer begins a line."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)

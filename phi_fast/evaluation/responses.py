"""What the model answered so far, on disk: an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..json_files import parse_json, read_regular

MAX_BYTES = 2**32
"""Of a file of answers."""


class Responses:
    """A JSON-lines file of answers by the hash of their request; the first line says of which model.

    With path=None nothing is kept. Raises UsageError where the file is another model's.
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
            path.write_text(json.dumps({"model": fingerprint}) + "\n", encoding="utf-8")

    @staticmethod
    def key(*request: Any) -> str:
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Any:
        return self.known[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers: they are on their way to the disk when this returns."""
        self.known.update(answers)
        if self.path is not None and answers:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, answer]) + "\n" for key, answer in answers.items())

    def _read(self, path: Path, fingerprint: str) -> None:
        data = read_regular(path, MAX_BYTES)
        lines = data.split(b"\n")
        try:
            found = parse_json(lines[0], str(path))["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} does not begin as a file of answers: name another --out, or delete it") from error
        if found != fingerprint:
            raise UsageError(
                f"{path} holds the answers of another model ({found}; this one is {fingerprint}); name another --out, "
                "or delete it"
            )
        if not data.endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in lines[1:]:
            try:
                key, answer = parse_json(line, str(path))
            except (ValueError, TypeError):  # the line that was being written when the process was stopped
                continue
            self.known[key] = answer

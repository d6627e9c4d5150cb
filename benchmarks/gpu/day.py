"""The result file of a GPU's day: one JSON document, written anew after everything that becomes known."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi_fast.files import write_atomically

NOT_MEASURED, RUNNING, DONE, FAILED, STOPPED = "not measured", "running", "done", "failed", "stopped"
"""States of a stage. One that is "running" in a file was cut short with the whole run: what it had measured is kept."""


class Day:
    """A document that is complete at every moment: a stage that was not reached is in it, as "not measured".

    head: what is known before the first stage (machine, commit, budget). stages: (name, title) in order.
    """

    def __init__(self, path: Path, head: dict[str, Any], stages: Sequence[tuple[str, str]]) -> None:
        self.path = path
        self.document: dict[str, Any] = head | {
            "began": datetime.datetime.now().isoformat(timespec="seconds"),
            "stages": {
                name: {"title": title, "state": NOT_MEASURED, "reason": "not reached", "seconds": None, "results": {}}
                for name, title in stages
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def set(self, stage: str, state: str, reason: str = "", seconds: float | None = None) -> None:
        """Record the state of a stage, and why it is so."""
        entry = self.document["stages"][stage]
        entry |= {"state": state, "reason": reason, "seconds": None if seconds is None else round(seconds, 1)}
        self._write()

    def put(self, stage: str, key: str, value: Any) -> None:
        """Keep one result of a stage: a JSON value; a list of objects is shown as a table."""
        self.document["stages"][stage]["results"][key] = value
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, (json.dumps(self.document, indent=1) + "\n").encode())


def unused(directory: Path, stem: str) -> Path:
    """STEM.json in `directory`, numbered where an earlier run of the day has that name: no measurement is replaced."""
    number, path = 1, directory / f"{stem}.json"
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.json"
    return path

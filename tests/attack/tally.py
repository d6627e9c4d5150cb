"""Counts of a campaign, saved in a file, so that they survive a crash of its process."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

MOST_FAILURES = 20
"""Number of failures after which a campaign ends: more would add no information."""
WRITE_SECONDS = 0.2


@dataclass
class Counts:
    """Counts of one campaign."""

    target: int
    done: int = 0
    failures: list[str] = field(default_factory=list)


class Tally:
    """Counts towards a target, within a number of seconds."""

    def __init__(self, file: Path, target: int, seconds: float) -> None:
        self.counts, self._file = Counts(target), file
        self._deadline = time.monotonic() + seconds
        self._written = 0.0
        self.write()

    @property
    def left(self) -> int:
        """Number of attacks until the target is reached."""
        return max(0, self.counts.target - self.counts.done)

    def more(self) -> bool:
        """Whether to continue: the target is not reached, there is time, and there are few failures so far."""
        return self.left > 0 and time.monotonic() < self._deadline and len(self.counts.failures) < MOST_FAILURES

    def did(self, attacks: int = 1) -> None:
        self.counts.done += attacks
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def failed(self, what: str) -> None:
        self.counts.failures.append(what)
        self.write()

    def raised(self, what: str, error: BaseException) -> None:
        """Record an error as a failure: its type, message, and the line that raised it."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        self.failed(f"{what}: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}: {last.line})")

    def write(self) -> None:
        self._written = time.monotonic()
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self.counts)))
        beside.replace(self._file)

"""The interface of all trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """A run as trackers know it, the same after each resume."""

    directory: Path
    id: str
    name: str
    config: Mapping[str, Any]
    """Options by dotted name; plain JSON values."""


class Tracker(Protocol):
    """Shows a run. Any method may raise any error."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take a step's figures by tag, such as "loss/train"; some may be NaN."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """Take a text, such as a sample."""
        ...

    def page(self, path: Path) -> None:
        """Take the report page, one HTML file."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...

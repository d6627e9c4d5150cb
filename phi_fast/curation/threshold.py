"""Keeps the documents whose score reaches a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .documents import CurateError, Document, Drop


class Threshold:
    """Drops documents whose score is below a threshold, and those without it, which are counted by themselves."""

    name = "threshold"

    def __init__(self, score: str, at_least: float) -> None:
        """Take the score's name and the least score that is kept. Raises CurateError for other values."""
        if not score:
            raise CurateError("name the score with --score")
        if not abs(at_least) < 1e300:
            raise CurateError(f"at_least={at_least}: expected a finite number")
        self._score, self._at_least = score, at_least

    def settings(self) -> dict[str, Any]:
        return {"score": self._score, "at_least": self._at_least}

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        """Compare each document's score."""
        return [self._judge_one(document) for document in documents]

    def _judge_one(self, document: Document) -> Drop | None:
        if (value := document.scores.get(self._score)) is None:
            return Drop(f"no score {self._score}")
        return None if value >= self._at_least else Drop(f"{self._score} below {self._at_least:g}")

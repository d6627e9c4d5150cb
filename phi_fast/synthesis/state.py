"""What a directory of synthetic texts holds: its journal, which answers are kept as documents, and the tokens spent.

Whether an answer is kept is decided in the order of the prompts, not in the order in which answers arrive. With a
server that gives the same completions, the documents are therefore the same bytes, however often a run was stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import check_begun, replacing, sync_directory, write_atomically
from .diversity import diversity, evenly
from .duplicates import NearDuplicates, words
from .journal import Answer, Journal, read_answer, read_journal
from .prompts import Prompts

JOURNAL, PLAN, DOCUMENTS, REPORT = "completions.log", "plan.json", "documents.jsonl", "report.json"
"""Files of the directory. The journal's suffix is none that `phi_fast.prepare` reads from a folder."""
LISTED = 100
"""Maximum number of near-duplicates that the report lists."""


@dataclass
class Totals:
    """Counts over all answers of the journal."""

    completed: int = 0
    refused: int = 0
    truncated: int = 0
    """Completions that ended at the maximum number of tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_refusal: str | None = None
    """The server's message."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def count(self, answer: Answer) -> None:
        if answer.kind == "refused":
            self.refused += 1
            self.first_refusal = self.first_refusal or answer.text[:500]
            return
        self.completed += 1
        self.truncated += answer.finish == "length"
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens


class State:
    """The answers so far. Use it as a context manager, which closes the journal."""

    def __init__(self, directory: Path, prompts: Prompts, similarity: float) -> None:
        """Read the journal of `directory`, which must exist, and decide about its answers.

        Raises UsageError for a damaged journal, OSError for one that cannot be written.
        """
        self.directory, self.prompts = directory, prompts
        self.totals = Totals()
        self.kept: list[int] = []
        """Numbers of the prompts whose completions are documents, ascending."""
        self.dropped: Counter[str] = Counter()
        """Reason -> number of completions that are not kept."""
        self.duplicates: list[tuple[int, int]] = []
        """(number of a near-duplicate, number of the document it resembles), the first `LISTED`."""
        self._near = NearDuplicates(similarity)
        self._offsets: dict[int, int] = {}
        self._waiting: dict[int, Answer] = {}
        self._decided = 0
        self.journal = Journal(directory / JOURNAL)
        for offset, answer in read_journal(self.journal.path):
            if answer.number in self._offsets or answer.number >= len(prompts):
                raise UsageError(
                    f"{self.journal.path}: prompt {answer.number} is answered twice, or does not exist: the journal "
                    "was changed by something else. Restore it, or name another --out"
                )
            self._offsets[answer.number] = offset
            self.totals.count(answer)
        self._decide()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.__exit__(None, None, None)

    @property
    def undecided(self) -> int:
        """Number of answers that wait for the answer to an earlier prompt."""
        return len(self._offsets) - self._decided

    def unanswered(self) -> Iterator[int]:
        """Numbers of the prompts that had no answer when each is yielded, ascending."""
        return (number for number in range(len(self.prompts)) if number not in self._offsets)

    def take(self, answer: Answer) -> None:
        """Record an answer, synced, and decide about those whose predecessors are all answered."""
        self._offsets[answer.number] = self.journal.append(answer)
        self._waiting[answer.number] = answer
        self.totals.count(answer)
        self._decide()

    def _decide(self) -> None:
        while self._decided in self._offsets:
            answer = self._waiting.pop(self._decided, None) or self._read(self._decided)
            if answer.kind == "completed":
                self._keep_or_drop(answer)
            self._decided += 1

    def _keep_or_drop(self, answer: Answer) -> None:
        try:
            answer.text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which `prepare` refuses
            self.dropped["not Unicode"] += 1
            return
        if not words(answer.text):
            self.dropped["without a word"] += 1
            return
        other = self._near.add(answer.number, answer.text)
        if other is None:
            self.kept.append(answer.number)
            return
        self.dropped["near-duplicate"] += 1
        if len(self.duplicates) < LISTED:
            self.duplicates.append((answer.number, other))

    def _read(self, number: int) -> Answer:
        return read_answer(self.journal.path, self._offsets[number])

    def write_documents(self, most: int | None, model: str) -> int:
        """Write the documents as JSONL in the order of their prompts, atomically; at most `most`. Returns how many."""
        path = self.directory / DOCUMENTS
        written = self.kept[:most]
        with replacing(path) as file:
            for number in written:
                answer, labels = self._read(number), self.prompts[number].labels
                record = {
                    "text": answer.text.strip(),
                    "id": f"{number:08d}",
                    **labels,
                    "model": model,
                    "finish": answer.finish,
                }
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        sync_directory(path.parent)
        return len(written)

    def write_report(self, fields: dict[str, Any], most: int | None) -> dict[str, Any]:
        """Write and return the report: `fields`, the counts, and the diversity of the documents."""
        kept = self.kept[:most]
        sample = [self._read(kept[i]).text for i in evenly(len(kept))]
        report = {
            **fields,
            "prompts": {
                "all": len(self.prompts),
                "completed": self.totals.completed,
                "refused": self.totals.refused,
                "first_refusal": self.totals.first_refusal,
            },
            "documents": {
                "kept": len(kept),
                "dropped": dict(self.dropped),
                "cut_at_max_tokens": self.totals.truncated,
                "by_audience": dict(Counter(self.prompts[number].audience for number in kept)),
                "by_style": dict(Counter(self.prompts[number].style for number in kept)),
                "near_duplicates": [{"number": a, "resembles": b} for a, b in self.duplicates],
            },
            "diversity": diversity(sample),
        }
        write_atomically(self.directory / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
        return report


def check_plan(directory: Path, plan: dict[str, Any]) -> None:
    """Record what determines the completions, or compare it with what was recorded.

    Raises UsageError naming what differs.
    """
    if not (directory / PLAN).exists() and (directory / JOURNAL).exists():
        raise UsageError(f"{directory} has a journal without {PLAN}: restore it, or name another --out")
    check_begun(directory / PLAN, plan, damaged="Restore it, or name another --out", other="--out")

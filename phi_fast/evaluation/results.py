"""Results of an evaluation: a score per task, and an answer per question."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import paper
from ..files import write_atomically


@dataclass(frozen=True)
class Question:
    """Result of one question."""

    name: str
    """"task/number"."""
    score: float
    """1 right, 0 wrong."""
    detail: Any = None
    """Log-likelihood of each choice, or the generated text and its outcome."""


@dataclass(frozen=True)
class TaskResult:
    """Result of one task."""

    task: str
    metric: str
    score: float
    """Mean over the questions, a fraction."""
    stderr: float
    """Standard error of that mean."""
    questions: int
    shots: int = 0
    notes: list[str] = field(default_factory=list)
    """Differences from the report's protocol."""
    groups: dict[str, float] = field(default_factory=dict)
    """Score of each group; for the safety score, of each demographic."""
    samples: list[Question] = field(default_factory=list)

    @staticmethod
    def of(task: str, metric: str, samples: list[Question], **more: Any) -> TaskResult:
        """Compute the mean over the questions and its standard error (with n − 1)."""
        scores = [sample.score for sample in samples]
        n = len(scores)
        mean = sum(scores) / n
        variance = sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 0.0
        return TaskResult(task, metric, mean, (variance / n) ** 0.5, n, samples=samples, **more)


def write(folder: Path, model: str, results: Mapping[str, TaskResult], facts: Mapping[str, Any]) -> None:
    """Write results.json, results.csv (with the report's figures), and samples/TASK.jsonl (one question per line)."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    tasks = {}
    for task, result in results.items():
        tasks[task] = {name: _json_value(value) for name, value in asdict(result).items() if name != "samples"}
        with (folder / "samples" / f"{task}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in result.samples)
    text = json.dumps({"model": model, "tasks": tasks, "source_of_reported": paper.SOURCE, **facts}, indent=1)
    write_atomically(folder / "results.json", f"{text}\n".encode())
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["task", "metric", "shots", "questions", "score", "stderr", *paper.models(), "notes"])
        for task, result in results.items():
            reported = [paper.score(name, task) for name in paper.models()]
            rows.writerow(
                [task, result.metric, result.shots, result.questions, f"{result.score:.6f}", f"{result.stderr:.6f}"]
                + ["" if score is None else str(score) for score in reported]
                + ["; ".join(result.notes)]
            )


def _json_value(value: Any) -> Any:
    """The value, or None for NaN, which JSON does not have."""
    return None if value != value else value

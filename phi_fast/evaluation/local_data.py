"""Questions from local JSON-lines files: `DIR/TASK.jsonl`, one question per line."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..json_files import read_lines
from .questions import QuestionError, Row, question

# Other file names for a task's questions.
FILE_NAMES = {
    "humaneval": ("human_eval",),
    "openbookqa": ("openbook_qa",),
    "social_iqa": ("siqa",),
}
MAX_BYTES = 2**32
"""Largest size of a file of questions."""


def find_file(folder: Path, task: str) -> Path | None:
    """Find a task's file: named after the task or one of its other names, with or without `_small` at the end."""
    names = (task, *FILE_NAMES.get(task, ()))
    candidates = [folder / f"{name}{suffix}.jsonl" for suffix in ("", "_small") for name in names]
    return next((path for path in candidates if path.exists()), None)


def read_rows(path: Path, task: str) -> list[Row]:
    """All questions of a file, with the fields of the hub's data set. Raises UsageError naming the line at fault."""
    rows: list[Row] = []
    for where, value in read_lines(path, whole=True, max_bytes=MAX_BYTES):
        row = question(task, value, where)
        if task == "hellaswag" and rows and row.keys() != rows[0].keys():
            raise QuestionError(f"{where} has {_form(row)}, the lines before it {_form(rows[0])}: give all in one form")
        rows.append(row)
    if not rows:
        raise UsageError(f"{path} has no questions")
    return rows


def _form(row: Row) -> str:
    return "the compact form" if "query" in row else "the hub's fields"

"""metrics.jsonl read back: a record per step, each field with its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .json_files import Fields, read_lines

COUNTS = ("step", "tokens")
FLAGS = ("skipped",)
GROUPS = ("val_losses", "tasks")
"""Numbers by name: of a corpus, of a task."""


def read_records(path: Path, way_out: str = "") -> list[dict[str, Any]]:
    """The lines that `metrics.MetricsLog` wrote; a last one that was cut short, as by a kill, is left out.

    Every field is null or has its type: `COUNTS` are integers, and "step" is always there, `FLAGS` are true or false,
    `GROUPS` are objects of numbers, and all others are numbers. way_out: the end of each message, what to do.
    Raises OSError as `open` does, and JsonFileError naming the file, the line and the field.
    """
    return [_record(Fields.of(value, where, way_out)) for where, value in read_lines(path)]


def _record(fields: Fields) -> dict[str, Any]:
    fields.whole("step")
    for name in fields.values:
        if name not in fields:
            continue
        if name in COUNTS:
            fields.whole(name)
        elif name in FLAGS:
            fields.flag(name)
        elif name in GROUPS:
            _check_numbers(fields.inner(name))
        else:
            fields.number(name)
    return fields.values


def _check_numbers(group: Fields) -> None:
    for name in group.values:
        if name in group:
            group.number(name)

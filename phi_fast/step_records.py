"""Reading of metrics.jsonl: one record per step, with the type of each field checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .json_files import Fields, read_lines

COUNTS = ("step", "tokens", "trained_tokens")
FLAGS = ("skipped",)
GROUPS = ("val_losses", "val_bpbs", "tasks")
"""Fields that map the name of a corpus or a task to a number."""


def read_records(path: Path, way_out: str = "") -> list[dict[str, Any]]:
    """Read the lines that `metrics.MetricsLog` wrote; a last line that was cut short, as by a kill, is left out.

    Every field is null or has its type: `COUNTS` are integers, `FLAGS` booleans, `GROUPS` objects of numbers, and all
    others numbers; "step" is never missing. way_out: what the user should do, appended to each message.
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

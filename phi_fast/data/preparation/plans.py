"""The record of what determines the units of a directory, so that work begun with other settings is not resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ...json_files import JsonFileError, read_object
from .containers import PrepareError

MAY_CHANGE = {"skip_malformed", "text_field", "suffixes", "validation"}
"""Settings that error messages advise to change; a resumed run keeps the units that the change does not affect."""


def partial_of(out: Path) -> Path:
    """The directory of the work in progress for `out`, beside it; links are followed."""
    place = Path(os.path.realpath(out))
    return place.with_name(place.name + ".partial")


def unit_settings(plan: dict[str, Any]) -> bytes:
    """What `tasks.Task.key` takes: everything in a plan that changes a unit."""
    return json.dumps({**plan, "skip_malformed": None}).encode()


def record_plan(partial: Path, plan: dict[str, Any]) -> None:
    """Write the plan of the work in a directory. Raises PrepareError if it was begun with other settings."""
    record = partial / "plan.json"
    try:
        before = read_object(record).values
    except FileNotFoundError:
        before = {}
    except (JsonFileError, OSError) as error:
        raise PrepareError(f"{error}. Remove {partial} to begin anew") from error
    changed = [name for name in plan if before and name not in MAY_CHANGE and plan[name] != before.get(name)]
    if changed:
        raise PrepareError(
            f"{partial} holds work begun with other {', '.join(changed)}: run with the settings it was begun with "
            "to resume, or remove it to begin anew"
        )
    write_atomically(record, json.dumps(plan, indent=1).encode())

"""Opening of the trackers that `--track` names."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files import write_atomically, writing
from ...json_files import read_object
from ...reporting.page import page
from ...reporting.read import read_runs
from .background import Background
from .mlflow import MLflow
from .tracker import TrackedRun, Tracker
from .trackio import Trackio
from .wandb import Wandb

OPENERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}
NAMES = ("tensorboard", *OPENERS)
"""What --track takes. TensorBoard's events are written in any case."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker that is not known or not installed."""
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--track {name}: expected some of {', '.join(NAMES)}")
        if name in OPENERS and importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name} needs the package {name}: pip install 'phi-fast[{name}]'")


def open_trackers(
    names: Sequence[str], directory: Path, config: Mapping[str, Any], warn: Callable[[str], None]
) -> list[Background]:
    """Open each tracker in the background, with the run that `directory` has been tracked as before.

    config: options by dotted name. warn: takes a line about a tracker that fails.
    Raises UsageError if the run's id cannot be read or written.
    """
    chosen = [name for name in dict.fromkeys(names) if name in OPENERS]
    if not chosen:
        return []
    run = TrackedRun(directory, *_identity(directory), config)
    return [Background(name, partial(OPENERS[name], run), warn) for name in chosen]


def _identity(directory: Path) -> tuple[str, str]:
    """Return the id and the name of the tracked run, which the directory keeps; a new run gets new ones."""
    path = directory / "tracked.json"
    if path.exists():
        found = read_object(path, way_out="Remove it to begin another tracked run")
        return found.text("id"), found.text("name")
    identity = {"id": uuid.uuid4().hex[:12], "name": directory.resolve().name}
    with writing(path, "make room, or leave --track out"):
        write_atomically(path, json.dumps(identity).encode())
    return identity["id"], identity["name"]


def send_report(directory: Path, trackers: Sequence[Background]) -> None:
    """Write a run's report page, as `python -m phi_fast.report` does, and pass it to the trackers."""
    path = directory / "report.html"
    try:
        write_atomically(path, page(read_runs([directory])).encode())
    except (UsageError, OSError) as error:  # a run that ended before its first step, or a full disk
        trackers[0].warn(f"--track: there is no report page to send ({error})")
        return
    for tracker in trackers:
        tracker.page(path)

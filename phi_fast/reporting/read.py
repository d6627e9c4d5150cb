"""Reading of a run directory: config.json, metrics.jsonl, and the samples in its TensorBoard events."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..json_files import flatten, read_object
from ..step_records import read_records

MOST_WEIGHT = 2**20
"""Largest weight of a corpus, which is the longest period of `chairman`."""
Curve = tuple[list[int], list[float | None]]
"""Steps and values; None at a step without a value (a skipped step has no gradient norm)."""


@dataclass(frozen=True)
class RunData:
    """The files of one run."""

    name: str
    """Unique among the runs of one report."""
    path: Path
    config: dict[str, Any]
    """config.json, with dotted names for nested fields."""
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    samples: list[tuple[int, str]]
    """(step, text) of the sampled texts, in order."""

    def curve(self, field: str) -> Curve:
        """Return a field's values over the steps that have the field; "val_losses.docs" is one corpus's."""
        steps, values = [], []
        outer, _, inner = field.partition(".")
        for record in self.records:
            if outer in record:
                value = (record[outer] or {}).get(inner) if inner else record[outer]
                steps.append(record["step"])
                values.append(None if value is None or not math.isfinite(value) else float(value))
        return steps, values

    def members(self, field: str) -> list[str]:
        """List the names in a field that is an object: the corpora of "val_losses", the tasks of "tasks"."""
        return list(dict.fromkeys(name for record in self.records for name in record.get(field) or {}))

    @property
    def mixture(self) -> dict[str, int]:
        """Corpus -> intended weight; empty for a config without one."""
        start = "mixture."
        return {key.removeprefix(start): value for key, value in self.config.items() if key.startswith(start)}

    @property
    def mixture_schedule(self) -> list[tuple[int, dict[str, int]]]:
        """(first step, weights) of the mixture and each stage, without weights of 0."""
        stages = [(0, self.mixture), *self.config.get("mixture_stages", [])]
        return [(int(step), {name: int(w) for name, w in weights.items() if int(w)}) for step, weights in stages]


def read_runs(paths: list[Path]) -> list[RunData]:
    """Read runs. Raises UsageError for a directory that is not a run, a run without a step, or a bad line."""
    names = [path.resolve().name for path in paths]
    unique = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    if len(set(unique)) < len(unique):
        twice = next(name for name in unique if unique.count(name) > 1)
        raise UsageError(f"{twice} is given twice; name each run once")
    return [_read(path, name) for path, name in zip(paths, unique, strict=True)]


def _read(path: Path, name: str) -> RunData:
    metrics, config = path / "metrics.jsonl", path / "config.json"
    for file in (metrics, config):
        if not file.is_file():
            raise UsageError(f"{file} does not exist: {path} is not a run directory; give one of phi_fast.train's")
    options = read_object(config, way_out="Give a run directory that phi_fast.train wrote")
    if "mixture" in options:
        mixture = options.inner("mixture")
        options.whole("global_batch_size", least=1)
        for corpus in mixture.values:
            mixture.whole(corpus, most=MOST_WEIGHT)
    records = read_records(metrics, "Correct or remove that line")
    if not records:
        raise UsageError(f"{metrics} has no step yet; report on {path} once the run has taken one")
    return RunData(name, path, flatten(options.values), records, _samples(path / "tensorboard"))


def _samples(events: Path) -> list[tuple[int, str]]:
    """Read the texts that `metrics.MetricsLog.text` wrote."""
    if not events.is_dir():
        return []
    for path in events.rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):  # TensorBoard would block on a pipe
            raise UsageError(f"{path} is not a regular file: remove it, or give a run directory that train wrote")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events), size_guidance={"tensors": 0})
    accumulator.Reload()
    found = []
    for tag in accumulator.Tags()["tensors"]:
        if tag.startswith("sample"):
            for event in accumulator.Tensors(tag):
                found.append((event.step, event.tensor_proto.string_val[0].decode("utf-8", "replace")))
    return sorted(found)

"""The charts of a report, and the key figures of each run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .curves import Series
from .read import RunData


@dataclass(frozen=True)
class Chart:
    """One chart of the page and of the picture."""

    title: str
    metric: str
    series: list[Series]
    log: bool = False


def charts(runs: list[RunData]) -> list[Chart]:
    """Choose the charts, with one curve per run.

    The loss scale is drawn only if it changed or a step was skipped in some run, bits per byte and the accuracies by
    task only if some run measured them.
    """
    validation = [Series(run.name, i, run.curve("val_loss")) for i, run in enumerate(runs)]
    validation += _members(runs, "val_losses")
    averages = [Series(f"{run.name}: ema", i, run.curve("ema_val_loss"), 3) for i, run in enumerate(runs)]
    validation += [one for one in averages if one.curve[0]]
    bits = [Series(run.name, i, run.curve("val_bpb")) for i, run in enumerate(runs)] + _members(runs, "val_bpbs")
    measured = any(value is not None for one in bits for value in one.curve[1])
    tasks = _members(runs, "tasks")
    return [
        Chart("Loss, nats per token", "loss", _all(runs, "loss", smooth=True)),
        Chart("Validation loss, nats per token", "val_loss", validation),
        *([Chart("Validation loss, bits per byte", "val_bpb", bits)] if measured else []),
        Chart("Gradient norm before clipping", "grad_norm", _all(runs, "grad_norm"), log=True),
        *([Chart("Loss scale", "loss_scale", _all(runs, "loss_scale"), log=True)] if _scaled(runs) else []),
        Chart("Throughput, tokens/s", "tokens_per_s", _all(runs, "tokens_per_s")),
        Chart("Learning rate", "lr", _all(runs, "lr")),
        *([Chart("Accuracy by task (--eval-every)", "tasks", tasks)] if tasks else []),
    ]


def figures(run: RunData) -> dict[str, str]:
    """Compute a run's key figures."""
    last = run.records[-1]
    skipped = sum(bool(record.get("skipped")) for record in run.records)
    validation = [value for value in run.curve("val_loss")[1] if value is not None]
    bits = [value for value in run.curve("val_bpb")[1] if value is not None]
    rates = [value for value in run.curve("tokens_per_s")[1] if value is not None]
    times = [value for value in run.curve("step_ms")[1] if value is not None]
    mfu = [value for value in run.curve("mfu")[1] if value is not None]
    return {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}" if "tokens" in last else "–",
        "last loss": _loss(last["loss"]) if "loss" in last else "–",
        "best validation loss": _loss(min(validation)) if validation else "not measured",
        "best bits per byte": _loss(min(bits)) if bits else "not measured",
        "tokens/s, median": f"{statistics.median(rates):,.0f}" if rates else "–",
        "MFU, median": f"{100 * statistics.median(mfu):.1f}%" if mfu else "not measured",
        "time in steps": _duration(sum(times) / 1000),
        "steps skipped": f"{skipped:,}",
    }


def differences(runs: list[RunData]) -> dict[str, list[str]]:
    """Map each field of config.json in which the runs differ to each run's value; "–" if a run does not have it."""
    fields = dict.fromkeys(key for run in runs for key in run.config)
    rows = {key: [str(run.config.get(key, "–")) for run in runs] for key in fields}
    return {key: values for key, values in rows.items() if len(set(values)) > 1 and key != "run_dir"}


def _scaled(runs: list[RunData]) -> bool:
    """Return whether any run's loss scale changed, or a step was skipped."""
    return any(
        len(set(run.curve("loss_scale")[1])) > 1 or any(record.get("skipped") for record in run.records) for run in runs
    )


def _all(runs: list[RunData], field: str, *, smooth: bool = False) -> list[Series]:
    return [Series(run.name, i, run.curve(field), smooth=smooth) for i, run in enumerate(runs)]


def _members(runs: list[RunData], field: str) -> list[Series]:
    return [
        Series(f"{run.name}: {name}", i, run.curve(f"{field}.{name}"), style)
        for i, run in enumerate(runs)
        for style, name in enumerate(run.members(field), 1)
    ]


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:.0f} s"

"""The plan printed as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import devices
from .devices import Device, Figure
from .estimate import Job, Plan
from .measure import Judged
from .published import Comparison
from .scaling import Scaling
from .work import Recompute


def overview(job: Job, p: Plan, console: Console) -> None:
    """Print the run's size, time and cost."""
    recipe, config = job.recipe, job.recipe.model
    table = _table(f"{p.ranks} × {job.device.name}", "", "", "")
    per_token = [recipe.flops_per_token(causal=causal) / 1e9 for causal in (False, True)]
    table.add_row("parameters", f"{config.num_parameters():,}", f"{config.matmul_parameters():,} in matrix products")
    if recipe.lora is not None:
        adapters = f"adapters of rank {recipe.lora.rank}; the others are frozen"
        table.add_row("trained parameters", f"{recipe.trained_parameters:,}", adapters)
    table.add_row("FLOPs per token", f"{per_token[0]:.3f} G", f"attention in full; {per_token[1]:.3f} G causal")
    table.add_row(
        "global batch",
        f"{recipe.global_batch_size} rows",
        f"{p.micro_batch_size} × {p.accumulation} accumulated × {p.ranks} ranks, of {recipe.sequence_length} tokens",
    )
    fit = f"{p.largest_micro_batch} rows" if p.largest_micro_batch else "none"
    if job.on_gpu:
        table.add_row("largest micro-batch", fit, "that divides a rank's rows and fits into memory")
    table.add_row("step", _time(p.step_seconds), _phases(p))
    rate = p.tokens_per_second_per_device
    table.add_row("tokens/s", f"{p.tokens_per_second:,.0f}", f"{rate:,.0f} per device")
    table.add_row("MFU", f"{100 * p.mfu_full:.1f}%", f"attention in full; {100 * p.mfu_causal:.1f}% causal")
    if p.hours is None or p.steps is None or p.device_hours is None:
        table.add_row("run", "not known", "the recipe states no number of tokens: give --tokens")
    else:
        table.add_row("run", f"{p.hours:,.1f} h", f"{p.steps:,} steps, {p.device_hours:,.1f} device hours")
        cost = "no price given: --price" if p.cost is None else "steps only: no checkpoints, faults or idle devices"
        table.add_row("cost", "–" if p.cost is None else f"${p.cost:,.0f}", cost)
    muon = job.recipe.optimizer == "muon"
    kept = (
        "weights; fp32 master, exp_avg, exp_avg_sq"
        + (" (of Muon's matrices momentum)" if muon else "")
        + ("" if job.recipe.ema_decay is None else ", average")
    )
    table.add_row("checkpoint", _bytes(p.checkpoint_bytes), kept)
    table.add_row(
        "loader",
        f"{p.loader_rows_per_second:,.1f} rows/s",
        f"{p.loader_bytes_per_second / 1e6:,.2f} MB/s of uint16 ids",
    )
    console.print(table)


def memory(job: Job, plans: dict[Recompute, Plan], console: Console) -> None:
    """Print memory by component, one column per recompute level, at the same micro-batch."""
    size = next(iter(plans.values())).micro_batch_size
    levels = [f"{name}{' (used)' if name == job.recompute else ''}" for name in plans]
    table = _table(f"memory of one device, {size} rows per micro-batch, by --recompute", "", *levels)
    for name in next(iter(plans.values())).memory.__dataclass_fields__:
        found = [getattr(p.memory, name) for p in plans.values()]
        values = [value if isinstance(value, str) else _bytes(value) for value in found]
        table.add_row(name.replace("_", " "), *values, end_section=name == "fragmentation")
    if job.device.memory is not None:
        table.add_row(
            f"of {_bytes(job.device.memory.value)}",
            *("fits" if p.fits else Text("no", style="red") for p in plans.values()),
        )
        table.add_row("largest micro-batch", *(str(p.largest_micro_batch) for p in plans.values()))
    table.add_row("step", *(_time(p.step_seconds) for p in plans.values()))
    console.print(table)
    console.print("the peak is the largest sum held at one time, not the sum of the lines", style="dim")


def communication(p: Plan, console: Console) -> None:
    """Print the bytes and seconds of communication per step."""
    sent = p.communication
    table = _table("communication of one device per step", "", "sent", "time", "")
    if p.ranks == 1:
        table.add_row("one device", "–", "–", "sends nothing")
    else:
        table.add_row(
            "gradients, reduced",
            _bytes(sent.gradient_bytes),
            _time(sent.gradient_seconds),
            f"once per {'step' if p.reductions == 1 else 'micro-batch'}; {_time(sent.exposed_seconds)} not overlapped",
        )
        table.add_row("weights, all-gather", _bytes(sent.gather_bytes), _time(sent.gather_seconds), "after the update")
    console.print(table)


def scale(result: Scaling, console: Console) -> None:
    """Print one row per number of devices, and where scaling stops."""
    table = _table(
        "scaling",
        "devices",
        "micro-batch",
        "step",
        "tokens/s",
        "of best rate",
        "MFU full",
        "hours",
        "cost",
        "largest cost besides forward and backward",
    )
    for p, efficiency, limit in zip(result.plans, result.efficiency, result.limits, strict=True):
        if not p.fits:
            table.add_row(str(p.ranks), "does not fit")
            continue
        table.add_row(
            str(p.ranks),
            f"{p.micro_batch_size} × {p.accumulation}",
            _time(p.step_seconds),
            f"{p.tokens_per_second:,.0f}",
            f"{100 * efficiency:.0f}%",
            f"{100 * p.mfu_full:.1f}%",
            "–" if p.hours is None else f"{p.hours:,.1f}",
            "–" if p.cost is None else f"${p.cost:,.0f}",
            limit,
        )
    console.print(table)
    console.print(result.stops)


def published(rows: list[Comparison], console: Console) -> None:
    """Print published speeds, and the plan's for phi-1.5 on the same devices."""
    table = _table(
        "comparison with published speeds",
        "what",
        "on",
        "tokens/s per device",
        "MFU full",
        "planned",
        "MFU full",
        "planned ÷ published",
        "source",
    )
    for row in rows:
        entry = row.published
        table.add_row(
            entry.what,
            f"{entry.devices} × {entry.device}",
            f"{entry.tokens_per_second:,.0f}",
            f"{100 * row.mfu:.1f}%",
            f"{row.plan.tokens_per_second_per_device:,.0f}",
            f"{100 * row.plan.mfu_full:.1f}%",
            f"{row.ratio:.2f}",
            entry.source,
        )
    console.print(table)
    console.print(
        "phi_fast on a GPU: not measured. The efficiencies are assumptions and were not fitted to this table.",
        style="dim",
    )


def judged(result: Judged, console: Console) -> None:
    """Print predictions and measurements on this machine."""
    table = _table("measured here", "", "predicted", "measured", "ratio")
    table.add_row("step", _time(result.predicted_seconds), _time(result.measured_seconds), f"{result.ratio:.2f}")
    for name, planned, found in (
        ("activations kept for backward", result.predicted_activation_bytes, result.measured_activation_bytes),
        ("peak of tensors", result.predicted_peak_bytes, result.measured_peak_bytes),
    ):
        table.add_row(name, _bytes(planned), _bytes(found), f"{planned / found:.3f}")
    console.print(table)


def assumptions(device: Device, price: float | None, console: Console) -> None:
    """Print every figure that the plan is based on, with its source."""
    table = _table("figures that this plan is based on", "", "value", "source")
    for name, figure in sources(device, price).items():
        table.add_row(name, quantity(figure), figure.source)
    console.print(table)


def sources(device: Device, price: float | None) -> dict[str, Figure]:
    """Return every figure by name: the device's, and the assumptions about software and links."""
    found = {name: getattr(device, name) for name in ("memory", "flops", "bandwidth", "link", "network", "price")}
    if price is not None:
        found["price"] = Figure(price, "$/h", "--price")
    found |= {f"efficiency, {kind}": figure for kind, figure in device.efficiency.items()}
    if device.link is not None:
        names = ("LAUNCH", "LINK_EFFICIENCY", "HOP", "NETWORK_HOP", "CONTEXT", "FRAGMENTATION")
        found |= {name.lower().replace("_", " "): getattr(devices, name) for name in names}
    return {name: figure for name, figure in found.items() if figure is not None}


def quantity(figure: Figure) -> str:
    """Format value and unit briefly."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if figure.unit in ("B", "B/s", "FLOP/s") and figure.value >= factor:
            return f"{figure.value / factor:,.5g} {prefix}{figure.unit}"
    return f"{1e6 * figure.value:.3g} µs" if figure.unit == "s" else f"{figure.value:.3g} {figure.unit}".strip()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        text = i == 0 or i == len(columns) - 1 or column == ""
        table.add_column(column, justify="left" if text else "right", no_wrap=i == 0, overflow="fold")
    return table


def _phases(p: Plan) -> str:
    return ", ".join(f"{name} {100 * seconds / p.step_seconds:.1f}%" for name, seconds in p.times.items())


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

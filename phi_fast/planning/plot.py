"""The plan as a picture: scaling, the parts of the memory by recompute level, and the parts of a step's time."""

from __future__ import annotations

from pathlib import Path

from .estimate import Job, Plan
from .scaling import Scaling
from .work import Recompute

_PARTS = (
    *("weights", "gradients", "sums", "optimizer", "buckets", "activations", "loss_chunk", "working", "context"),
    *("fragmentation", "peak"),
)


def draw(job: Job, plans: dict[Recompute, Plan], result: Scaling | None, path: Path) -> None:
    """Write a PNG. result: None for a CPU, which is not scaled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16 if result else 11, 5.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, 3 if result else 2, squeeze=False)[0])
    used = plans[job.recompute]
    figure.suptitle(f"{used.ranks} × {job.device.name}, planned, not measured", fontsize=11)
    if result:
        fitting = [p for p in result.plans if p.fits]
        axis = axes.pop(0)
        axis.plot([p.ranks for p in fitting], [p.tokens_per_second for p in fitting], "o-", label="planned")
        if fitting:
            best = max(p.tokens_per_second_per_device for p in fitting)
            axis.plot([p.ranks for p in fitting], [best * p.ranks for p in fitting], "--", color="gray", label="linear")
        axis.set(xscale="log", yscale="log", xlabel="devices", ylabel="tokens/s", title="scaling")
        axis.legend(fontsize=8)
        axis.grid(lw=0.3)
    _memory(axes[0], job, plans)
    parts = used.times
    axes[1].barh(list(parts), [1000 * value for value in parts.values()])
    axes[1].invert_yaxis()
    axes[1].set(xlabel="ms per step", title="where a step goes")
    figure.savefig(path)


def _memory(axis, job: Job, plans: dict[Recompute, Plan]) -> None:
    """Draw a bar for each part and recompute level, labelled with its figure because some bars are very short."""
    height = 0.8 / len(plans)
    for i, (level, plan) in enumerate(plans.items()):
        values = [getattr(plan.memory, part) / 1e9 for part in _PARTS]
        places = [at + (i - (len(plans) - 1) / 2) * height for at in range(len(_PARTS))]
        bars = axis.barh(places, values, height, label=level)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=6, padding=2)
    if job.device.memory is not None:
        axis.axvline(job.device.memory.value / 1e9, color="black", ls="--", lw=1, label=job.device.name)
    axis.set_yticks(range(len(_PARTS)), [part.replace("_", " ") for part in _PARTS], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="GB per device", title="memory (parts are not all held at once)")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=7, title="--recompute", title_fontsize=7)

"""The plan as a picture: scaling, memory by recompute level, where a step's time goes."""

from __future__ import annotations

from pathlib import Path

from .estimate import Job, Plan
from .scaling import Scaling
from .work import Recompute

_PARTS = ("weights", "gradients", "optimizer", "buckets", "activations", "loss_chunk", "working", "context")


def draw(job: Job, plans: dict[Recompute, Plan], result: Scaling | None, path: Path) -> None:
    """Writes a PNG. result: None where there is one device only, and nothing scales."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13 if result else 8.5, 4.2), dpi=140, layout="constrained")
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
    axes[1].set(xlabel="ms a step", title="where a step goes")
    figure.savefig(path)


def _memory(axis, job: Job, plans: dict[Recompute, Plan]) -> None:
    bottom = [0.0] * len(plans)
    for part in _PARTS:
        heights = [getattr(p.memory, part) / 1e9 for p in plans.values()]
        axis.bar(list(plans), heights, bottom=bottom, label=part.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.plot(list(plans), [p.memory.peak / 1e9 for p in plans.values()], "k_", ms=28, label="peak")
    if job.device.memory is not None:
        axis.axhline(job.device.memory.value / 1e9, color="red", lw=1, label=job.device.name)
    axis.set(ylabel="GB a device", xlabel="--recompute", title="memory (parts are not all held at once)")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=6, markerscale=0.3)

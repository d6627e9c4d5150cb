"""Scaling of a recipe over 1 to 1024 devices, and the number at which more devices stop paying."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .devices import NETWORK_HOP
from .estimate import Job, Plan, plan

COUNTS = tuple(2**i for i in range(11))
ENOUGH = 0.8
"""Scaling stops at the number of devices where the rate per device falls below this share of the best."""


@dataclass(frozen=True)
class Scaling:
    """Plans by number of devices, and where scaling stops."""

    plans: list[Plan]
    efficiency: list[float]
    """Tokens/s per device of each plan ÷ the best of all plans that fit."""
    limits: list[str]
    """The largest cost of each plan besides forward and backward."""
    stops: str
    """Where scaling stops, and why, in words."""


def scaling(job: Job) -> Scaling:
    """Plan for each of `COUNTS` devices that divides the global batch."""
    batch = job.recipe.global_batch_size
    plans = [plan(replace(job, ranks=n, micro_batch_size=None)) for n in COUNTS if batch % n == 0 and n <= batch]
    rates = [p.tokens_per_second_per_device for p in plans if p.fits]
    best = max(rates, default=1.0)
    efficiency = [p.tokens_per_second_per_device / best for p in plans]
    limits = [_limit(p) for p in plans]
    return Scaling(plans, efficiency, limits, _stops(job, plans, efficiency))


def _costs(p: Plan) -> dict[str, float]:
    """List the seconds per step that are not forward or backward."""
    return {
        "reducing gradients": p.communication.exposed_seconds,
        "weights' all-gather": p.communication.gather_seconds,
        "gradient copies": p.phases["gradients"],
        "update": p.phases["update"],
    }


def _limit(p: Plan) -> str:
    if not p.fits:
        return "memory"
    name, seconds = max(_costs(p).items(), key=lambda item: item[1])
    return f"{name} {100 * seconds / p.step_seconds:.0f}%"


def _stops(job: Job, plans: list[Plan], efficiency: list[float]) -> str:
    """Describe where scaling stops, and why."""
    fitting = [(p, share) for p, share in zip(plans, efficiency, strict=True) if p.fits]
    if not fitting:
        return f"Not one row fits into the memory of a {job.device.name}, whatever their number."
    best = max(range(len(fitting)), key=lambda i: fitting[i][1])
    poor = next((p for p, share in fitting[best:] if share < ENOUGH), None)
    batch = job.recipe.global_batch_size
    limit = f"The global batch of {batch} rows allows at most {batch} ranks."
    last = poor or fitting[-1][0]
    rows = batch // last.ranks
    costs = _costs(last)
    shares = ", ".join(f"{name} {100 * s / last.step_seconds:.0f}%" for name, s in costs.items())
    why = (
        f"a rank has only {rows} row{'s' if rows > 1 else ''} per step to compute, but still sends "
        f"{(last.communication.gradient_bytes + last.communication.gather_bytes) / 1e9:.2g} GB per step, whatever the "
        f"number of ranks, and each rank adds a hop to the all-gather's ring ({1e6 * NETWORK_HOP.value:.0f} µs between "
        f"nodes); shares of the step: {shares}"
    )
    if poor is None:
        return f"Above {100 * ENOUGH:.0f}% of the best rate per device up to {last.ranks}; there {why}. {limit}"
    return f"Stops at {poor.ranks}: below {100 * ENOUGH:.0f}% of the best rate per device, because {why}. {limit}"

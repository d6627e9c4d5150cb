"""Comparison of the arms: differences paired by seed, their intervals, and what they say about the hypotheses."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PRIMARY = (("H1", "filtered", "raw"), ("H2", "books", "raw"))
"""The hypotheses: the first arm needs fewer bits per byte than the second."""
SECONDARY = (("H3", "books", "filtered"),)
LEVEL = 0.95
RESAMPLES = 10_000

Runs = Sequence[dict[str, Any]]
Measure = Callable[[dict[str, Any]], float]


def held_out(run: dict[str, Any]) -> float:
    """Return the primary measure: bits per byte, averaged over the kinds of held-out text."""
    return statistics.fmean(run["held_out"].values())


def of_kind(kind: str) -> Measure:
    """Return the measure "bits per byte of one kind of held-out text"."""

    def bits(run: dict[str, Any]) -> float:
        return float(run["held_out"][kind])

    return bits


@dataclass(frozen=True)
class Difference:
    """One arm's measure minus another's, paired by seed: below zero, the first arm is better in bits."""

    values: tuple[float, ...]
    """One per seed."""
    mean: float
    low: float
    high: float
    """Ends of the t interval at LEVEL."""
    bootstrap: tuple[float, float]
    """Ends of the bootstrap percentile interval over seeds, at LEVEL."""
    p: float
    """p value of the two-sided paired t test."""


def difference(runs: Runs, first: str, second: str, measure: Measure = held_out) -> Difference:
    """Compare two arms over the seeds that both have. Raises ValueError for fewer than two such seeds."""
    from scipy import stats

    by_arm = {arm: {run["seed"]: measure(run) for run in runs if run["arm"] == arm} for arm in (first, second)}
    seeds = sorted(by_arm[first].keys() & by_arm[second].keys())
    if len(seeds) < 2:
        raise ValueError(f"{first} and {second} have {len(seeds)} seeds in common; expected 2 or more")
    values = np.array([by_arm[first][seed] - by_arm[second][seed] for seed in seeds])
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, len(values) - 1) if error else float(mean == 0)
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return Difference(
        values=tuple(values.tolist()),
        mean=float(mean),
        low=float(mean - half),
        high=float(mean + half),
        bootstrap=(low, high),
        p=float(p),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for testing several hypotheses (Holm 1979): each is significant if its result is below α."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """Verdict of the runs on one hypothesis."""

    name: str
    first: str
    second: str
    difference: Difference
    p: float
    """Adjusted by Holm's method among the primary hypotheses; as it is for a secondary one."""
    better: int
    """Kinds of held-out text on which the first arm's mean is lower."""
    kinds: int

    @property
    def outcome(self) -> str:
        """Apply the rule that docs/textbooks.md fixed before the runs."""
        majority = 2 * self.better > self.kinds
        if self.p < 1 - LEVEL and self.difference.mean < 0:
            return "supported" if majority else "mixed: fewer bits on average, but not on most kinds"
        if self.p < 1 - LEVEL:
            return "contradicted: significantly more bits"
        return "not supported: no significant difference"


def verdicts(runs: Runs) -> list[Verdict]:
    """Judge every hypothesis, the primary ones first."""
    kinds = list(runs[0]["held_out"])

    def judged(name: str, first: str, second: str, found: Difference, p: float) -> Verdict:
        better = sum(difference(runs, first, second, of_kind(kind)).mean < 0 for kind in kinds)
        return Verdict(name, first, second, found, p, better, len(kinds))

    primary = [difference(runs, first, second) for _, first, second in PRIMARY]
    adjusted = holm([found.p for found in primary])
    result = [judged(*names, found, p) for names, found, p in zip(PRIMARY, primary, adjusted, strict=True)]
    for names in SECONDARY:
        found = difference(runs, *names[1:])
        result.append(judged(*names, found, found.p))
    return result

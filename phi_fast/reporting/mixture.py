"""How many rows of each corpus a run has drawn, beside what its weights intend.

A run records no draws, because it need not: row g of the stream is a pure function of the mixture (docs/data.md). The
rows are counted with the loader's own assignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from phi_fast._C import tokens as _tokens

from .read import RunData


@dataclass(frozen=True)
class Draw:
    """One corpus of a run."""

    corpus: str
    intended: float
    """Share by the weights."""
    drawn: int
    """Rows of it that the run has read."""
    rows: int
    """Rows of all corpora."""
    worst: float
    """Largest distance between drawn and intended rows after any step."""

    @property
    def share(self) -> float:
        """Drawn."""
        return self.drawn / self.rows


def draws(run: RunData) -> list[Draw]:
    """Counts for each corpus with a weight, up to the run's last step; empty without a mixture or before a step."""
    weights = {name: weight for name, weight in run.mixture.items() if weight}
    if not weights or not run.records[-1]["step"]:
        return []
    divisor = math.gcd(*weights.values())
    period = np.asarray(_tokens.chairman([weight // divisor for weight in weights.values()]))
    batch = int(run.config["global_batch_size"])
    ends = np.array([record["step"] for record in run.records], dtype=np.int64) * batch  # rows read after each step
    found = []
    for index, (name, weight) in enumerate(weights.items()):
        before = np.concatenate(([0], np.cumsum(period == index)))  # of the period's first n slots
        drawn = ends // len(period) * before[-1] + before[ends % len(period)]
        share = weight / sum(weights.values())
        worst = float(np.abs(drawn - share * ends).max())
        found.append(Draw(name, share, int(drawn[-1]), int(ends[-1]), worst))
    return found

"""The rows that a run has drawn from each corpus, compared with the mixture's weights.

A run does not record its draws: row g of the stream is a pure function of the mixture (docs/data.md). The rows are
therefore counted with the loader's own assignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from phi_fast._C import tokens as _tokens

from ..errors import UsageError
from .read import RunData


@dataclass(frozen=True)
class Draw:
    """The rows that a run has drawn from one corpus."""

    corpus: str
    intended: float
    """Share by the weights; if there are stages, averaged over their rows."""
    drawn: int
    """Rows read from this corpus."""
    rows: int
    """Rows read from all corpora."""
    worst: float
    """Largest difference between drawn and intended rows after any step."""

    @property
    def share(self) -> float:
        """The drawn share."""
        return self.drawn / self.rows


def draws(run: RunData) -> list[Draw]:
    """Count the rows of each corpus with a weight up to the run's last step.

    The list is empty without a mixture or before the first step. Raises UsageError for impossible steps or weights.
    """
    last = run.records[-1]["step"]
    if not run.mixture or not last:
        return []
    batch = run.config["global_batch_size"]
    if max(record["step"] for record in run.records) * batch >= 2**63:
        raise UsageError(f"{run.path}: a step of metrics.jsonl × global_batch_size {batch} is 2^63 rows or more")
    ends = np.array([record["step"] for record in run.records], dtype=np.int64) * batch  # rows read after each step
    schedule = run.mixture_schedule
    starts = np.array([step for step, _ in schedule]) * batch
    drawn = {name: np.zeros(len(ends), dtype=np.int64) for name in run.mixture}
    intended = {name: np.zeros(len(ends)) for name in run.mixture}
    shares = dict.fromkeys(run.mixture, 0.0)
    for (_, weights), start, end in zip(schedule, starts, [*starts[1:], ends[-1]], strict=True):
        divisor = math.gcd(*weights.values())
        try:
            period = np.asarray(_tokens.chairman([weight // divisor for weight in weights.values()]))
        except ValueError as error:
            raise UsageError(f"{run.path / 'config.json'}: mixture: {error}") from error
        rows = np.clip(ends, start, max(start, end)) - start  # of this stage, after each step
        for index, (name, weight) in enumerate(weights.items()):
            before = np.concatenate(([0], np.cumsum(period == index)))  # of the period's first n slots
            drawn[name] += rows // len(period) * before[-1] + before[rows % len(period)]
            share = weight / sum(weights.values())
            intended[name] += rows * share
            shares[name] += share * float(rows[-1] / ends[-1])
    return [
        Draw(
            name,
            intended=shares[name],
            drawn=int(drawn[name][-1]),
            rows=int(ends[-1]),
            worst=float(np.abs(drawn[name] - intended[name]).max()),
        )
        for name in run.mixture
        if shares[name]
    ]

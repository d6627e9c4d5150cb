"""Computes how often a run reads each of its corpora."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .formats import open_layout
from .mixture import Mixture

MOST_REPEATS = 4
"""Up to about 4 epochs, repeated tokens are nearly as good as new ones (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class PlanRow:
    """One corpus in a plan."""

    name: str
    tokens: int
    """Number of tokens in the corpus."""
    share: float
    """Its share of the run's tokens, over all stages."""
    seen: int
    """Number of its tokens that the run reads."""
    epochs: float
    """seen ÷ tokens."""

    @property
    def warning(self) -> str | None:
        """Warning if the corpus is read more than MOST_REPEATS times."""
        if self.epochs <= MOST_REPEATS:
            return None
        return (
            f"{self.name} is read {self.epochs:.1f} times: beyond {MOST_REPEATS} epochs repeated tokens are worth less "
            "(arXiv 2305.16264); lower its weight, train on fewer tokens or add data"
        )


@dataclass(frozen=True)
class MixturePlan:
    """Epochs over each corpus; `print(plan)` shows a table and the warnings."""

    tokens: int
    rows: tuple[PlanRow, ...]

    @property
    def warnings(self) -> list[str]:
        return [row.warning for row in self.rows if row.warning]

    def __str__(self) -> str:
        width = max(6, *(len(row.name) for row in self.rows))
        lines = [f"{'corpus':{width}} {'share':>6} {'tokens':>19} {'seen':>19} {'epochs':>8}"]
        lines += [
            f"{row.name:{width}} {row.share:6.1%} {row.tokens:19,} {row.seen:19,} {row.epochs:8.2f}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def plan_mixture(
    mixture: Mixture | Mapping[str, tuple[int, int]], tokens: int, *, sequence_length: int = 2048
) -> MixturePlan:
    """Compute how much of each corpus a run of `tokens` tokens reads.

    mixture: a Mixture, whose corpora are opened for their sizes, or name -> (tokens in the corpus, weight).
    sequence_length: tokens per row; stages begin at rows.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: must be at least 1")
    if isinstance(mixture, Mixture):
        sizes = {c.name: open_layout(c.path, c.split, c.dtype).tokens for c in mixture.components}
        schedule = mixture.schedule()
    else:
        sizes = {name: size for name, (size, _) in mixture.items()}
        for name, (size, weight) in mixture.items():
            if size < 1 or weight < 0:
                raise ValueError(f"{name!r} has {size} tokens and weight {weight}: expected at least 1, and at least 0")
        if not any(weight for _, weight in mixture.values()):
            raise ValueError(f"the weights of {list(mixture)} are all 0; give at least one corpus a positive weight")
        schedule = [(0, [weight for _, weight in mixture.values()])]
    ends = [min(tokens, start * sequence_length) for start, _ in schedule[1:]] + [tokens]
    seen, begin = dict.fromkeys(sizes, 0.0), 0
    for (_, weights), end in zip(schedule, ends, strict=True):
        for name, weight in zip(sizes, weights, strict=True):
            seen[name] += (end - begin) * weight / sum(weights)
        begin = end
    rows = (PlanRow(n, sizes[n], seen[n] / tokens, round(seen[n]), seen[n] / sizes[n]) for n in sizes)
    return MixturePlan(tokens, tuple(rows))

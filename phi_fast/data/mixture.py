"""Mixtures: the corpora that a run reads, their weights, and how these change during the run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .formats import Dtype


@dataclass(frozen=True)
class Component:
    """One corpus of a mixture."""

    name: str
    """Name for messages and checkpoints, and key of the shuffle: another name gives another order."""
    path: Path
    """A corpus directory, its URL, or a token file."""
    weight: int = 1
    """Number of rows of this corpus in every sum(weights) rows, from row 0 to the first stage; 0: none."""
    split: str = "train"
    """Split of the corpus directory; not used for a token file."""
    dtype: Dtype | None = None
    """Only for files that do not record it."""
    delimiter: int | None = None
    """Id between documents; only for files that do not record it, and only needed to isolate documents."""


@dataclass(frozen=True)
class Stage:
    """New weights from `start_row` on."""

    start_row: int
    """Row of the stream: steps × global batch."""
    weights: Mapping[str, int]
    """Component name -> weight; components that are not named have weight 0."""


@dataclass(frozen=True)
class Mixture:
    """Corpora with integer weights, counted in rows: at every row each corpus has its share to within one row.

    `stages` change the weights; each corpus continues where it was, so a stage repeats no rows.
    Raises ValueError for names that are not unique, weights that are not integers or all 0, and stages out of order.
    """

    components: tuple[Component, ...]
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        if not names:
            raise ValueError("a mixture needs at least one corpus")
        if len(set(names)) != len(names):
            raise ValueError(f"mixture names must be unique, found {names}")
        start_row = 0
        for stage in self.stages:
            if stage.start_row <= start_row:
                raise ValueError(
                    f"stage start_row={stage.start_row} must be greater than {start_row}, the start of the stage before"
                )
            if unknown := set(stage.weights) - set(names):
                raise ValueError(f"stage at row {stage.start_row} weighs {sorted(unknown)}, the mixture has {names}")
            start_row = stage.start_row
        for start_row, weights in self.schedule():
            for name, weight in zip(names, weights, strict=True):
                if isinstance(weight, bool) or not isinstance(weight, int) or weight < 0:
                    raise ValueError(f"weight of {name!r} from row {start_row} is {weight!r}, expected an integer >= 0")
            if not any(weights):
                raise ValueError(f"all weights from row {start_row} are 0; give at least one corpus a positive weight")
        for i, name in enumerate(names):
            if not any(weights[i] for _, weights in self.schedule()):
                raise ValueError(f"weight of {name!r} is 0 throughout; give it a positive weight or leave it out")

    @staticmethod
    def of(
        corpora: Mapping[str, tuple[str | Path, int]],
        split: str = "train",
        stages: Sequence[tuple[int, Mapping[str, int]]] = (),
        dtype: Dtype | None = None,
    ) -> Mixture:
        """`Mixture.of({"docs": ("data/docs", 80), "code": ("data/code", 20)})`.

        corpora: name -> (path, weight). stages: (start_row, name -> weight). split, dtype: of every corpus.
        """
        components = (Component(name, Path(path), weight, split, dtype) for name, (path, weight) in corpora.items())
        return Mixture(tuple(components), tuple(Stage(row, dict(weights)) for row, weights in stages))

    def schedule(self) -> list[tuple[int, list[int]]]:
        """(start_row, weights in the components' order), the first from row 0."""
        first = (0, [component.weight for component in self.components])
        return [
            first,
            *(
                (stage.start_row, [stage.weights.get(component.name, 0) for component in self.components])
                for stage in self.stages
            ),
        ]

    @property
    def hash(self) -> str:
        """Hex digest of what determines the order of rows: names, splits, ratios of weights, and stages; not paths."""
        names = [[component.name, component.split] for component in self.components]
        content = [names, [[row, [w // math.gcd(*weights) for w in weights]] for row, weights in self.schedule()]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

"""A training step, from a global batch to updated weights."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import Batch
from .zero import StepOutcome, Zero2


def train_step(zero: Zero2, batches: Sequence[Batch], lr: float) -> StepOutcome:
    """Run forward and backward on this rank's micro-batches, then update the weights at learning rate `lr`."""
    for batch in batches:
        zero.micro_batch(batch)
    return zero.step(lr)

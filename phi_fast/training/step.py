"""A training step, from a global batch to updated weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import Batch
from .distributed import World
from .instruments import UNWATCHED, StepWatch
from .zero import StepOutcome, Zero2


def train_step(zero: Zero2, batches: Sequence[Batch], lr: float, watch: StepWatch = UNWATCHED) -> StepOutcome:
    """Run forward and backward on this rank's micro-batches, then update the weights at learning rate `lr`."""
    with watch.step():
        trained = count_trained(batches, zero.world)
        for batch in batches:
            with watch.micro_batch():
                zero.micro_batch(batch, trained)
        with watch.update():
            outcome = zero.step(lr)
    return outcome if trained is None else replace(outcome, trained_tokens=int(trained))


def count_trained(batches: Sequence[Batch], world: World) -> Tensor | None:
    """Count the labels that count in the loss of the global batch: an int64 scalar on the device, equal on all ranks.

    None if no corpus has marks, which every rank knows without asking the others.
    """
    counts = [batch.trained for batch in batches if batch.trained is not None]
    if not counts:
        return None
    total = torch.tensor(sum(counts), device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return total

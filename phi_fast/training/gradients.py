"""Where a step's gradients are, from the end of its last backward pass to the update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .deferred_gradients import DeferredGradients, ReducedGradients
from .distributed import World
from .flat_gradients import FlatGradients
from .local_gradients import LocalGradients
from .partitions import sends_directly


class Gradients(Protocol):
    """The gradients of a step, averaged over the ranks."""

    def of(self, group: int) -> Iterable[tuple[int, Tensor]]:
        """List (offset in this rank's flat partition, gradient) for all of the group's gradients."""
        ...

    def accept(self, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Take the sums of all micro-batches of a step from a captured graph, in place of autograd's hooks; a parameter
        that took no part may be missing."""
        ...

    def clear(self) -> None:
        """Release the step's gradients."""
        ...


def gradients_of(zero: Any, world: World, accumulation: int, *, reduce_once: bool) -> Gradients:
    """Decide who sums, reduces and keeps the gradients of DeepSpeed's optimizer `zero`."""
    if world.size == 1:
        return LocalGradients(zero, accumulation)
    if sends_directly(world) and (reduce_once or accumulation == 1):
        return FlatGradients(zero, world, accumulation)
    return DeferredGradients(zero, accumulation) if reduce_once else ReducedGradients(zero)

"""What goes wrong outside a step, on one rank or on all: kept until every rank knows, so that all save and then end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ..errors import UsageError
from .checkpoint import CheckpointError
from .distributed import World


class Trouble:
    """The first error on this rank that ends the run after a step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.error: Exception | None = None

    @property
    def here(self) -> bool:
        """This rank has an error: it takes no step after this one."""
        return self.error is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is raised inside, for `end`; a later error does not replace an earlier one.

        A collective that fails is no such error: the other ranks are lost, and no save can follow.
        """
        try:
            yield
        except dist.DistError:
            raise
        except Exception as error:
            if "gloo" in str(error):  # torch raises a plain RuntimeError for a connection that was closed
                raise
            self.error = self.error or error

    @contextmanager
    def while_saving(self) -> Iterator[None]:
        """The last save: where it fails after another error, both are told."""
        try:
            yield
        except CheckpointError as error:
            if self.error is None or str(self.error) == str(error):
                raise
            raise CheckpointError(f"{self.error}. Nor could the run be saved at its end: {error}") from self.error

    def end(self) -> None:
        """Raise the error, on every rank: this rank's own, or UsageError with that of another one."""
        everyones: list[str | None] = [None if self.error is None else str(self.error)]
        if self.world.size > 1:
            everyones *= self.world.size
            dist.all_gather_object(everyones, None if self.error is None else str(self.error))
        if self.error is not None:
            raise self.error
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(everyones) if text is not None)
        raise UsageError(f"another rank cannot go on ({told})")

"""Errors outside a step, on one rank or all: kept until every rank knows of them, so that all save and then end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ..errors import UsageError
from .checkpoint import CheckpointError
from .distributed import World


class Trouble:
    """Keeps the first error on this rank that is to end the run after the present step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.error: Exception | None = None

    @property
    def here(self) -> bool:
        """True if this rank has an error and takes no further step."""
        return self.error is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an error raised inside, for `end`; a later error does not replace an earlier one.

        A failed collective is raised at once: the other ranks are lost, and nothing can be saved.
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
        """Guard the last save: if it fails after an earlier error, raise CheckpointError with both messages."""
        try:
            yield
        except CheckpointError as error:
            if self.error is None or str(self.error) == str(error):
                raise
            raise CheckpointError(
                f"{self.error}. The run could not be saved at its end, either: {error}"
            ) from self.error

    def end(self) -> None:
        """Raise, on every rank, this rank's own error, or else UsageError with those of the other ranks."""
        messages = self.world.gather(None if self.error is None else str(self.error))
        if self.error is not None:
            raise self.error
        others = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None)
        raise UsageError(f"another rank cannot go on ({others})")

"""What a person or a scheduler asks of a running run by signals, agreed on by all ranks.

SIGINT, SIGTERM    save and stop after this step; a validation is broken off
SIGUSR1            save after this step and go on
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import World


class Signals:
    """Catches the signals while it is entered. `stop` and `save` change only where every rank sees them change."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stop = False
        """Agreed: this step is the run's last."""
        self.save = False
        """Agreed: a checkpoint is wanted after this step."""
        self.failed = False
        """Agreed: a rank's save in the background failed."""
        self.broken = False
        """Agreed: a rank's update left a weight or a moment that is not finite."""
        self.stop_received = False
        """This rank was asked to stop; the others may not know yet."""
        self._save_received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save_received = True
            return
        if self.stop_received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.stop_received = True

    def agree(self, loss: Tensor, *, failed: bool = False, broken: bool = False) -> float:
        """End of a step: the mean of the ranks' scalar `loss`; sets `stop`, `save`, `failed` and `broken` on every rank
        where one of them has it. The one all-reduce and wait for the device of a step outside the optimizer."""
        flags = [self.stop_received, self._save_received, failed, broken]
        self._save_received = False
        sums = torch.cat([loss.float().view(1) / self.world.size, loss.new_tensor(flags, dtype=torch.float32)])
        if self.world.size > 1:
            dist.all_reduce(sums)
        mean_loss, *asked = sums.tolist()
        self.stop, self.save, self.failed, self.broken = (count > 0 for count in asked)
        return mean_loss

"""An exponential moving average of the weights, in fp32, partitioned over the ranks as the optimizer's state is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WeightAverage:
    """Averages this rank's partitions of the fp32 master weights: average ← decay · average + (1 − decay) · weights.

    The average starts as the weights themselves. It costs 4 bytes per parameter, divided by the number of ranks.

    masters: this rank's flat partition of each parameter group, fp32.
    """

    def __init__(self, decay: float, masters: Sequence[Tensor]) -> None:
        self._decay, self._masters = decay, masters
        self.averages = [master.detach().clone() for master in masters]
        """The average of each of `masters`."""

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take in the weights after a step; skipped: a scalar on the device that is 0 if the step updated them."""
        weight = torch.where(skipped > 0, 0.0, 1 - self._decay)
        for average, master in zip(self.averages, self._masters, strict=True):
            average.lerp_(master.detach(), weight.to(average.dtype))

    @torch.no_grad()
    def load(self, averages: Sequence[Tensor] | None) -> None:
        """Load a checkpoint's averages; None: start again as the weights."""
        for average, other in zip(self.averages, averages or self._masters, strict=True):
            average.copy_(other)

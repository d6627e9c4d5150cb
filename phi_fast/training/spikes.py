"""Loss spikes: the steps to skip, chosen on the device from the losses so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 64
"""Window of the exponential averages of mean and variance, in steps."""
WARMUP = 16
"""Number of first steps whose losses cannot be spikes."""


class SpikeFilter:
    """Decides whether a step's loss lies more than `z` standard deviations above the running mean.

    A spike enters the averages with the threshold's value instead of its own: one spike does not hide the next, and a
    loss that stays high is accepted after some steps. A falling loss is never a spike. Nothing waits for the device.
    """

    def __init__(self, z: float, device: torch.device) -> None:
        self.z = z
        self.state = torch.zeros(3, dtype=torch.float64, device=device)
        """[losses seen, mean, variance]."""

    def judge(self, loss: Tensor) -> Tensor:
        """Return 1.0 if `loss` (a scalar, the mean over all ranks) is a spike, else 0.0, and update the averages.

        A loss that is not finite is an overflow, which has its own flag: it is not a spike and not averaged.
        """
        count, mean, variance = self.state
        loss = loss.double()
        limit = mean + self.z * variance.sqrt()
        spike = (count >= WARMUP) & (loss > limit) & torch.isfinite(loss)
        deviation = torch.where(spike, limit, loss) - mean
        weight = 1 / (count + 1).clamp(max=WINDOW)
        taken = torch.stack(
            [count + 1, mean + weight * deviation, (1 - weight) * (variance + weight * deviation.square())]
        )
        self.state = torch.where(torch.isfinite(loss), taken, self.state)
        return spike.float()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, JSON-able."""
        return {"state": self.state.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = torch.tensor(state["state"], dtype=torch.float64, device=self.state.device)

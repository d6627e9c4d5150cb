"""Loss spikes: which steps to leave out, decided on the device from the losses so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 64
"""Steps that the running mean and variance look back over (exponential average)."""
WARMUP = 16
"""Steps before any loss can be a spike."""


class SpikeFilter:
    """Says of each step's loss whether it lies more than `z` standard deviations above the running mean.

    The averages take a spike in at the threshold, not at its height: one spike does not hide the next, and a loss that
    stays high is let through after some steps. Falling losses never count. Nothing here waits for the device.
    """

    def __init__(self, z: float, device: torch.device) -> None:
        self.z = z
        self.state = torch.zeros(3, dtype=torch.float64, device=device)
        """[losses seen, mean, variance]."""

    def judge(self, loss: Tensor) -> Tensor:
        """1.0 where `loss` (a scalar tensor, the mean over all ranks) is a spike, else 0.0; then takes it in.

        A loss that is not finite is neither a spike nor taken in: it is an overflow, which has its own flag.
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
        """JSON-able."""
        return {"state": self.state.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = torch.tensor(state["state"], dtype=torch.float64, device=self.state.device)

"""Spikes of the loss and of the gradient norm: the steps to skip, chosen on the device from the steps so far."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..recipes import Recipe

WINDOW = 64
"""Window of the exponential averages of mean and variance, in steps."""
WARMUP = 16
"""Number of first steps whose losses cannot be spikes."""


class SpikeFilter:
    """Decides whether a step's loss, or its norm, lies more than `z` standard deviations above the running mean.

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


class SpikeFilters:
    """The filters that a recipe asks for: of the loss ("spikes") and of the gradient norm ("norm_spikes")."""

    def __init__(self, filters: Mapping[str, SpikeFilter]) -> None:
        self._filters = filters

    @staticmethod
    def of(recipe: Recipe, device: torch.device) -> SpikeFilters:
        """Make the filters of --skip-spikes and --skip-norm-spikes."""
        wanted = {"spikes": recipe.skip_spikes, "norm_spikes": recipe.skip_norm_spikes}
        return SpikeFilters({name: SpikeFilter(z, device) for name, z in wanted.items() if z})

    def __bool__(self) -> bool:
        """Return whether there is any filter."""
        return bool(self._filters)

    def judge(self, *, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 if the loss or the norm (scalars, the same on every rank) is a spike; every filter learns its own.

        Needs at least one filter.
        """
        values = {"spikes": loss, "norm_spikes": norm}
        return torch.stack([filter.judge(values[name]) for name, filter in self._filters.items()]).amax()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name, JSON-able."""
        return {name: filter.state_dict() for name, filter in self._filters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the averages that `state` has, among other entries; a filter that it lacks starts anew."""
        for name, filter in self._filters.items():
            if name in state:
                filter.load_state_dict(state[name])


NO_FILTERS = SpikeFilters(MappingProxyType({}))
"""For a step that skips no spikes."""

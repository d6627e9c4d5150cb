"""Gradients summed in flat buffers and averaged once per step, for ranks that exchange partitions directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import World
from .hooks import take_over
from .partitions import average_to_owners


class FlatGradients:
    """Takes each gradient from autograd's hook, in place of DeepSpeed's reduction, and averages a step's sums.

    The sums of a step's micro-batches lie as DeepSpeed lays out the weights, so each rank's part is one message. They
    are in fp32, a single micro-batch in the model's dtype, and parts are sent in the model's dtype.
    """

    def __init__(self, zero: Any, world: World, accumulation: int) -> None:
        self._world, self._accumulation = world, accumulation
        self._left = accumulation
        """Backward passes left in this step."""
        flats: list[Tensor] = zero.bit16_groups_flat
        self._dtype = flats[0].dtype
        """The number format in which gradients are sent."""
        sums = torch.float32 if accumulation > 1 else self._dtype
        self._flats = [torch.zeros_like(flat, dtype=sums) for flat in flats]
        self._places: dict[nn.Parameter, Tensor] = {}
        """Parameter -> its view of a flat buffer."""
        for flat, group, offsets in zip(
            self._flats, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True
        ):
            for parameter, offset in zip(group, offsets, strict=True):
                self._places[parameter] = flat.narrow(0, offset, parameter.numel()).view_as(parameter)
        self._seen: set[nn.Parameter] = set()
        """The parameters whose sum has begun in this step."""
        self._averages: list[Tensor] = []
        take_over(zero, self._take, self._end)

    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._add(parameter, gradient)

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if parameter in self._seen:
            self._places[parameter] += gradient
        else:
            self._places[parameter].copy_(gradient)
            self._seen.add(parameter)

    def _end(self) -> None:
        """Finish a backward pass; the last one of a step averages the sums over the ranks."""
        self._left -= 1
        if self._left:
            return
        self._left = self._accumulation
        for parameter in self._places.keys() - self._seen:
            self._places[parameter].zero_()
        self._seen.clear()
        self._averages = average_to_owners(self._flats, self._dtype, self._world)

    def accept(self, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Average a step's gradients, given their sums."""
        for parameter, gradient in sums.items():
            self._add(parameter, gradient)
        self._left = 1
        self._end()

    def of(self, group: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (0, averaged gradients of this rank's whole partition of the group, in fp32)."""
        yield 0, self._averages[group]

    def clear(self) -> None:
        """Release what the step does not keep for the next one."""
        self._averages = []

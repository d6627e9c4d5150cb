"""Gradients on a single rank, where ZeRO has nothing to communicate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import take_over


class LocalGradients:
    """Takes each gradient from autograd's hook, in place of DeepSpeed's reduction.

    With several ranks that reduction averages and partitions the gradients. On one rank it only copies them: to fp32,
    into a bucket, divided by 1, out of the bucket, added to a zero-filled partition. Here a step of one micro-batch
    keeps autograd's gradients in the model's dtype; several micro-batches are summed in fp32.
    """

    def __init__(self, zero: Any, accumulation: int) -> None:
        self._groups: list[list[nn.Parameter]] = zero.round_robin_bit16_groups
        self._offsets: list[list[int]] = zero.round_robin_bit16_offsets
        self._sum = accumulation > 1
        self._taken: dict[nn.Parameter, Tensor] = {}
        take_over(zero, self._take, lambda: None)

    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if parameter in self._taken:
            self._taken[parameter] += gradient
        else:
            self._taken[parameter] = gradient.float() if self._sum else gradient.contiguous()

    def accept(self, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Take the step's gradients from a captured graph."""
        self._taken = dict(sums)

    def of(self, group: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first element in the flat group, gradient) per parameter; zeros for a parameter without gradient."""
        for parameter, offset in zip(self._groups[group], self._offsets[group], strict=True):
            gradient = self._taken.get(parameter)
            yield offset, torch.zeros_like(parameter) if gradient is None else gradient

    def clear(self) -> None:
        """Release the step's gradients."""
        self._taken.clear()

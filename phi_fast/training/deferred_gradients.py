"""Gradients that DeepSpeed reduces, and one reduction per step, however many micro-batches it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import World
from .options import Options


class ReducedGradients:
    """Gradients that DeepSpeed reduces: this rank's flat partition of them, in fp32 for 16-bit models."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._reduce, self._finish = zero.process_gradients, zero.overlapping_partition_gradients_reduce_epilogue

    def accept(self, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Reduce a step's gradients, given their sums; they are rounded to the model's dtype."""
        self._zero.set_gradient_accumulation_boundary(True)
        for group, parameters in enumerate(self._zero.bit16_groups):
            for parameter in parameters:
                if parameter in sums:
                    self._hand_over(parameter, group, sums[parameter])
        self._finish()

    def _hand_over(self, parameter: nn.Parameter, group: int, gradient: Tensor) -> None:
        parameter.grad = gradient.to(parameter.dtype)
        self._zero.micro_step_id = 0  # DeepSpeed would add a later micro-batch to the first one's reduced gradients
        self._reduce(parameter, group)

    def of(self, group: int) -> list[tuple[int, Tensor]]:
        """Return [(0, averaged gradients of this rank's whole partition of the group)]."""
        flat = self._zero._get_preflattened_grad_partition(group)
        return [(0, self._zero.flatten(self._zero.averaged_gradients[group]) if flat is None else flat)]

    def clear(self) -> None:
        """Release the step's gradients."""
        zero = self._zero
        zero._release_preflattened_grad_buffers()
        for group, parameters in enumerate(zero.bit16_groups):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
            for parameter in parameters:
                parameter.grad = parameter.grad_accum = None


class DeferredGradients(ReducedGradients):
    """Sums each rank's micro-batches in fp32, and passes the sum to DeepSpeed's reduction in the last one.

    DeepSpeed's ZeRO-2 reduces the gradients of every micro-batch. Reducing their sum sends as many bytes as a single
    micro-batch, still in buckets during the backward pass, and costs 4 bytes per parameter on each rank. The sum is
    rounded to the model's dtype before it is sent, whereas DeepSpeed rounds each micro-batch's gradients.
    """

    def __init__(self, zero: Any, accumulation: int) -> None:
        super().__init__(zero)
        self._accumulation = accumulation
        self._left = accumulation
        """Backward passes left in this step."""
        self._sums: dict[nn.Parameter, tuple[int, Tensor]] = {}
        """Parameter -> (its group, sum of its gradients so far)."""
        zero.process_gradients = self._take
        zero.overlapping_partition_gradients_reduce_epilogue = self._end

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if self._left == 1:
            _, earlier = self._sums.pop(parameter, (group, None))
            self._hand_over(parameter, group, gradient if earlier is None else earlier.add_(gradient))
            return
        parameter.grad = None
        if parameter in self._sums:
            self._sums[parameter][1].add_(gradient)
        else:
            self._sums[parameter] = group, gradient.float()

    def _end(self) -> None:
        """Finish a backward pass; the last one of a step also reduces the parameters that took no part in it."""
        self._left -= 1
        if self._left:
            return
        for parameter, (group, earlier) in self._sums.items():
            self._hand_over(parameter, group, earlier)
        self._sums.clear()
        self._left = self._accumulation
        self._finish()


def reduces_once(options: Options, world: World, accumulation: int) -> bool:
    """Return whether `--reduce-gradients` means one reduction per step on these ranks."""
    choice = options.reduce_gradients
    if world.size == 1 or accumulation == 1 or choice == "micro-batch" or options.zero_step == "deepspeed":
        return False
    if choice == "step" or world.device.type != "cuda":
        return True
    return sums_fit(options.trained_parameters, torch.cuda.get_device_properties(world.device).total_memory)


def sums_fit(parameters: int, memory: float) -> bool:
    """Whether fp32 sums of all gradients take at most a tenth of a GPU's `memory` in bytes."""
    return 4 * parameters <= memory / 10


def reduces_to_owners(ranks: int, device: str = "cuda") -> bool:
    """Whether each part of a bucket is reduced to the rank that owns it, instead of the bucket to all ranks.

    NCCL then sends half the bytes, but in one call per owner, and a call's latency grows with the ranks too. For 1.4
    billion parameters the calls take longer than the bytes from about 50 ranks on (`planning.communication`). gloo
    sends more to reduce to one rank than its share of an all-reduce: 99 MB against 88 per step of phi-tiny on 2 ranks.
    """
    return device == "cuda" and ranks <= 32

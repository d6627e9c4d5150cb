"""Hooks on a model's parameters, in place of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def take_over(zero: Any, take: Callable[[nn.Parameter], None], end: Callable[[], None]) -> None:
    """Give each parameter to `take` when autograd has made its gradient, and call `end` after each backward pass.

    DeepSpeed's own hooks also count the parameters, to find the end of a backward pass that its engine did not start.
    """
    for handle in zero._grad_acc_hooks:
        handle.remove()
    parameters = [parameter for group in zero.bit16_groups for parameter in group if parameter.requires_grad]
    zero._grad_acc_hooks[:] = [parameter.register_post_accumulate_grad_hook(take) for parameter in parameters]
    zero.overlapping_partition_gradients_reduce_epilogue = end

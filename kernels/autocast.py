"""Casts under torch.autocast: the ops' inputs are cast, and no product inside an op is cast again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def active(x: Tensor) -> bool:
    """Whether torch.autocast is on for x's device."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def lowered(x: Tensor) -> Tensor:
    """x as torch's autocast hands it to F.linear: in autocast's dtype, unless x is fp64 or not floating point."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def off(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor or a tuple that begins with one, with autocast off inside: it has
    chosen its dtypes itself."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0][0] if isinstance(args[0], tuple) else args[0]
        assert isinstance(x, Tensor)
        if not active(x):
            return function(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped

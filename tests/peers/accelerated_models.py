"""pytest plugin: every model of a family that `accelerate` knows is accelerated as soon as it has been constructed."""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

from transformers import PreTrainedModel

from phi_fast.kernels import accelerate, restore
from phi_fast.kernels.transformers.families import FAMILIES
from phi_fast.kernels.transformers.modules import swapped

_constructing = threading.local()


def _accelerated_when_done(cls: type[PreTrainedModel]) -> None:
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        depth = getattr(_constructing, "depth", 0)
        _constructing.depth = depth + 1
        try:
            construct(self, *args, **kwargs)
        finally:
            _constructing.depth = depth
        if depth == 0:  # a model inside another is accelerated with it
            if swapped(self):  # `type(model)(config)` constructs a second time what has been accelerated here
                restore(self)
            accelerate(self)

    cls.__init__ = __init__


def pytest_configure() -> None:
    """Called by pytest before it imports a test."""
    for family in FAMILIES:
        module = importlib.import_module(family.module)
        for cls in list(vars(module).values()):
            own = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == family.module
            if own and not cls.__name__.endswith("PreTrainedModel"):
                _accelerated_when_done(cls)

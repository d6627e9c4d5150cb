"""A module changes its class for a subclass with another `forward`, and back.

The instance's own attributes are not touched: parameters, buffers, hooks, state_dict and what deepcopy, DataParallel,
PEFT and Trainer see stay what they were. transformers expects it: FSDP2 does the same, and gradient checkpointing wraps
the `forward` of a layer's subclass and of no class below it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., object]
Builder = Callable[[type[nn.Module]], Forward]
"""base class -> the forward that replaces `base.forward`, which it calls where it does not apply."""

_BASE = "_phi_fast_base"


def swap(module: nn.Module, build: Builder) -> None:
    """Let `module` run the forward that `build` makes for its class."""
    module.__class__ = _subclass(type(module), build)


def swap_back(model: nn.Module) -> None:
    """Undo every `swap` in `model`. Raises ValueError, and changes nothing, where something else has changed the class
    of a swapped module since."""
    classes = {}
    for module in model.modules():
        cls = type(module)
        if _BASE in vars(cls):
            classes[module] = vars(cls)[_BASE]
        elif hasattr(cls, _BASE):
            raise ValueError(
                f"{cls.__module__}.{cls.__qualname__} was made from an accelerated module's class, by FSDP2 for one; "
                "restore the model before it is wrapped"
            )
    for module, cls in classes.items():
        module.__class__ = cls


def swapped(module: nn.Module) -> bool:
    return hasattr(type(module), _BASE)


def original(module: nn.Module) -> type[nn.Module]:
    """The class without this library's forward."""
    return getattr(type(module), _BASE, type(module))


def _subclass(base: type[nn.Module], build: Builder) -> type[nn.Module]:
    if (base, build) not in _subclasses:
        # transformers writes the class's name into config.json and looks outputs up by it.
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        forward = functools.wraps(base.forward)(build(base))  # Trainer and generate() read the signature
        members = {**names, "forward": forward, "__new__": _new, _BASE: base}
        _subclasses[base, build] = type(base.__name__, (base,), members)
    return _subclasses[base, build]


def _new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A new model made by an accelerated one's class (`type(model)(config)`, `type(model).from_pretrained(...)`) is a
    plain one. Without arguments it is deepcopy or DataParallel that makes the copy of an instance."""
    return vars(cls)[_BASE](*args, **kwargs) if args or kwargs else nn.Module.__new__(cls)


_subclasses: dict[tuple[type[nn.Module], Builder], type[nn.Module]] = {}


def hooked(*modules: nn.Module) -> bool:
    """True where somebody looks at one of these modules' calls (transformers' own capture of attentions, ZeRO-3,
    accelerate's device_map, a user): its `__call__` must run then."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        for module in modules
    )


def plain(module: nn.Module, cls: type[nn.Module] = nn.Linear) -> bool:
    """True where calling `module` does what `cls` does on its weights and nothing else: no LoRA, no hook."""
    return original(module) is cls and not hooked(module)

"""phi: on the kernels (`phi`), in plain PyTorch (`reference`), and the conversion between their weights (`merged`).

Each name is imported on first use, so that the reference can be used without any kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import KeyValueCache
    from .merged import to_merged, to_split
    from .output import Output
    from .phi import Phi
    from .reference import ReferencePhi

__all__ = ["KeyValueCache", "Output", "Phi", "ReferencePhi", "to_merged", "to_split"]

_OWNERS = {
    "KeyValueCache": "cache",
    "Output": "output",
    "Phi": "phi",
    "ReferencePhi": "reference",
    "to_merged": "merged",
    "to_split": "merged",
}


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OWNERS[name]}"), name)

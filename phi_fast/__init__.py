"""phi_fast: a phi-1.5 trainer with custom kernels, and a kernel library that other models can use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import PhiConfig

if TYPE_CHECKING:
    from .model.phi import Phi

__version__ = "0.1.0"
__all__ = ["Phi", "PhiConfig", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Phi` on first use, so that commands that do not need torch start without it."""
    if name == "Phi":
        from .model.phi import Phi

        return Phi
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

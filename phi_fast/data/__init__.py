"""Token data: prepared corpora, mixtures of them, and the loader that streams their rows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats import FormatError
    from .loader import Batch, TokenLoader
    from .mixture import Component, Mixture, Stage
    from .plan import MixturePlan, plan_mixture
    from .remote.cache import DataCache
    from .remote.mirror import remote_corpus
    from .store import count_rows, documents, sequential_rows
    from .vocabulary import tokenizer

__all__ = [
    "Batch",
    "Component",
    "DataCache",
    "FormatError",
    "Mixture",
    "MixturePlan",
    "Stage",
    "TokenLoader",
    "count_rows",
    "documents",
    "plan_mixture",
    "remote_corpus",
    "sequential_rows",
    "tokenizer",
]

_HOMES = {
    "formats": ("FormatError",),
    "loader": ("Batch", "TokenLoader"),
    "mixture": ("Component", "Mixture", "Stage"),
    "plan": ("MixturePlan", "plan_mixture"),
    "remote.cache": ("DataCache",),
    "remote.mirror": ("remote_corpus",),
    "store": ("count_rows", "documents", "sequential_rows"),
    "vocabulary": ("tokenizer",),
}


def __getattr__(name: str) -> Any:
    """Import a module on the first use of one of its names, so that `prepare` and its workers start without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

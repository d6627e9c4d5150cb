"""Packages of the extra `curate`, which are imported only by the steps that use them."""

from __future__ import annotations

import importlib.util

from .documents import CurateError


def require(module: str, what: str, package: str | None = None) -> None:
    """Raise CurateError unless a module can be imported. package: what pip installs; None: the extra `curate`."""
    if importlib.util.find_spec(module) is None:
        package = package or "'phi-fast[curate]'"
        raise CurateError(f"{what} needs {module}, which is not installed: pip install {package}")

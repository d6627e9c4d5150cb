"""The milliseconds that were expected of a device before it was touched."""

from __future__ import annotations

import importlib
import importlib.util

MODULE = "benchmarks.gpu.predictions"


def predicted(device: str) -> dict[str, float] | None:
    """Name -> milliseconds by `benchmarks.gpu.predictions.predicted(device)`; None where nobody predicted any.

    device: the driver's name. Names are those of `page.milliseconds`.
    """
    if importlib.util.find_spec(MODULE) is None:
        return None
    return dict(importlib.import_module(MODULE).predicted(device)) or None

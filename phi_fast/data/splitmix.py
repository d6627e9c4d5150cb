"""SplitMix64 (Steele, Lea, Flood 2014) on arrays: numbers in a row become numbers that look random."""

from __future__ import annotations

from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""What the generator adds for each number."""


def mix(x: _Array) -> _Array:
    """Spread every bit of uint64 numbers over all bits: the generator's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

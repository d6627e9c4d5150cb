"""Timing of contenders in turn, which leaves out early what is far behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from .timing import Timer

ROUNDS = 15
"""Figures of a contender that stays in the race."""
BEHIND = 1.5
"""A contender whose median is this many times the best one's leaves."""
TIE = 0.02
"""A contender replaces the first one only if it is faster by this share: less is within the noise of two runs."""


def race(
    contenders: Mapping[Any, Callable[[], object]],
    measure: Timer,
    *,
    until: Callable[[], bool],
    refused: Callable[[Any, Exception], None],
    refusals: tuple[type[Exception], ...] = (),
) -> dict[Any, list[float]]:
    """Seconds of each contender's runs, measured in turn, without its first.

    The first contender always stays, as the yardstick. until: whether the time is up; each one still gets a figure.
    refused: told of a contender that raised one of `refusals` and left; the first one's is raised.
    """
    first = next(iter(contenders))
    alive, seconds = list(contenders), {key: list[float]() for key in contenders}
    for turn in range(ROUNDS + 1):
        for key in tuple(alive):
            if turn > 1 and until():
                break
            try:
                taken = measure(contenders[key])
            except refusals as error:
                if key == first:
                    raise
                alive.remove(key)
                del seconds[key]
                refused(key, error)
                continue
            if turn:
                seconds[key].append(taken)
        if turn:
            best = min(median(seconds[key]) for key in alive)
            alive = [key for key in alive if key == first or median(seconds[key]) <= BEHIND * best]
        if turn and until():
            break
    return seconds


def winner(seconds: Mapping[Any, list[float]]) -> Any:
    """The fastest contender by its median, or the first where none beats it by more than `TIE`."""
    first = next(iter(seconds))
    best = min(seconds, key=lambda key: median(seconds[key]))
    return best if median(seconds[best]) < (1 - TIE) * median(seconds[first]) else first

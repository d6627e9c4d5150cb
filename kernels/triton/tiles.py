"""How a kernel gets its tile: the one chosen by hand, or the one that `phi_fast.kernels.tune` measured on this GPU.

A kernel declares what can be chosen. Its tile is a NamedTuple of ints and bools (block sizes, warps, stages, variants
of the code), and a `Tunable` lists the values that the tuner tries for each field:

    class Tile(NamedTuple):
        m: int
        warps: int
        descriptors: bool

    DQ = Tunable("attention.dq", Tile, Case, {"m": (64, 128), "warps": (4, 8), "descriptors": (False, True)})

Its launcher asks for the tile at every launch, `DQ.tile(device, by_hand, case_of, *arguments)`, and passes it to
`launching.launch` among the arguments, so that a kept launch is used for that tile only. `by_hand` is the tile without
a measurement, whose values must be among those tried; `case_of(*arguments)`, which is called where this GPU has
measurements, gives what the choice depends on: a `Case`, a NamedTuple of ints, bools and strings. Nothing is timed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import tuned
from .common import next_power_of_2


class RowCase(NamedTuple):
    """What the tile of a kernel over rows or elements depends on."""

    dtype: str
    """dtype of the elements, for example "float16"."""
    width: int
    """Elements of a row, as a power of two."""
    length: int
    """Rows, as a power of two (`bucket`)."""
    variant: str = ""
    """Other work that the kernel does beside, in words."""


@dataclass(frozen=True, eq=False)
class Tunable:
    """A kernel whose tile can be chosen by measurement."""

    name: str
    """op.pass, as `codegen` names it: "attention.dq"."""
    fields: Any
    """The tile's NamedTuple."""
    case: Any
    """The NamedTuple of what the choice depends on."""
    tried: Mapping[str, tuple[int, ...]]
    """Field of the tile -> the values that the tuner tries, among them all that are chosen by hand."""

    def tile(self, device: torch.device, by_hand: Any, case_of: Callable[..., Any], *arguments: Any) -> Any:
        """The tile of a launch on `device`: the measured one where this GPU's table has one for the case, else
        `by_hand`."""
        if _sessions:
            return _sessions[-1].choose(self, case_of(*arguments), by_hand)
        found = _measured(self, device)
        return found.get(case_of(*arguments), by_hand) if found else by_hand

    def candidates(self, by_hand: Any) -> list[Any]:
        """Every combination of the values tried, the nearest to `by_hand` first, which is the first itself.

        The distance counts doublings: candidates of a budget that ends early are those close to the considered choice.
        """
        values = [dict.fromkeys((*self.tried.get(name, ()), getattr(by_hand, name))) for name in self.fields._fields]
        found = (self.fields(*choice) for choice in itertools.product(*values))
        return sorted(found, key=lambda tile: sum(map(_distance, tile, by_hand)))

    def parse(self, tile: Any) -> Any:
        """The tile of a JSON object. Raises ValueError for fields or values that this kernel does not have."""
        if not isinstance(tile, dict) or set(tile) != set(self.fields._fields):
            raise ValueError(f"the tile of {self.name} is {tile}; expected {', '.join(self.fields._fields)}")
        for name, value in tile.items():
            tried = self.tried.get(name, ())
            if not any(value == known and type(value) is type(known) for known in tried):
                raise ValueError(f"{name} of {self.name} is {value!r}; expected one of {tried}")
        return self.fields(**tile)


def _distance(a: int, b: int) -> float:
    return abs(math.log2(a / b)) if a and b else float(a != b)


def bucket(length: int) -> int:
    """The power of two, from `length` up, that stands for a number of rows in a `case`."""
    return next_power_of_2(max(1, length))


def words(dtype: torch.dtype) -> str:
    """ "float16" of torch.float16."""
    return _WORDS[dtype]


_WORDS = {
    getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8")
}


@lru_cache(maxsize=1024)
def _measured(tunable: Tunable, device: torch.device) -> dict[Any, Any]:
    """Case -> tile for `tunable`, from the table of this device's measurements; empty where there is none."""
    if device.type != "cuda":
        return {}
    return tuned.of(device).tiles(tunable.name, tunable.case, tunable.parse)


def forget() -> None:
    """Read the tables anew at the next launch."""
    _measured.cache_clear()
    tuned.forget()


class Choice(NamedTuple):
    """One launch's choice, as a `session` saw it."""

    tunable: Tunable
    case: Any
    by_hand: Any


class Session:
    """The choices of the launches made inside a `session`."""

    def __init__(self, tiles: Mapping[tuple[str, Any], Any]) -> None:
        self.tiles = tiles
        self.choices: list[Choice] = []

    def choose(self, tunable: Tunable, case: Any, by_hand: Any) -> Any:
        """Note the choice, and make it: one of `tiles`, or `by_hand`. No table is read."""
        self.choices.append(Choice(tunable, case, by_hand))
        return self.tiles.get((tunable.name, case), by_hand)


_sessions: list[Session] = []


@contextlib.contextmanager
def session(tiles: Mapping[tuple[str, Any], Any] | None = None) -> Iterator[Session]:
    """Choose the tiles of the launches inside: (kernel name, case) -> tile; other launches have theirs by hand."""
    _sessions.append(Session(tiles or {}))
    try:
        yield _sessions[-1]
    finally:
        _sessions.pop()

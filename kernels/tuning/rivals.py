"""Attention by this project's kernels, with their fastest tiles, beside other libraries'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import backend
from ..triton.attention_tiles import KERNELS
from ..triton.tiles import session
from ..tuned import Table
from .candidates import first_line
from .race import race, winner
from .subjects import Make
from .sweep import Tools, milliseconds

NAMES = ("triton", *(name for name, ops in backend.VENDORS.items() if "attention" in ops))
"""Back ends of attention on a GPU, this project's first: a tie keeps it."""
_REFUSALS = (backend.BackendUnavailable, ImportError, RuntimeError, ValueError, TypeError, AssertionError)
"""What a library raises that is not installed, or does not take the shape, the dtype or the GPU."""


def compare(
    make: Make, tools: Tools, entries: list[dict[str, Any]], deadline: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The table's entry for attention's back ends at the shape of `make`: forward and backward, in milliseconds.

    entries: the table's tiles, with which this project's kernels run. The choice is the fastest of those that give the
    same bits in every run (`backend.REPEATABLE`); the others' times are kept for the reader.
    """
    measure, runs = tools.timer(), dict[str, Callable[[], Any]]()
    with session(_tiles(entries)), tools.on_stream(measure):
        for name in NAMES:
            try:
                runs[name], case = make.attention_by(backend.module(name, "attention"))
                runs[name]()
            except _REFUSALS as error:
                runs.pop(name, None)
                if name == "triton":
                    raise
                tell(f"attention by {name} is not timed: {first_line(error)}")
        seconds = race(
            runs,
            measure,
            until=lambda: tools.clock() >= deadline,
            refused=lambda name, error: tell(f"attention by {name} is not timed: {first_line(error)}"),
            refusals=_REFUSALS,
        )
    allowed = {name: figures for name, figures in seconds.items() if name in ("triton", *backend.REPEATABLE)}
    found = {name: milliseconds(figures) for name, figures in seconds.items()}
    tell(f"attention, forward and backward: {', '.join(f'{name} {ms:g} ms' for name, ms in found.items())}")
    return {"op": "attention", "case": case._asdict(), "backend": winner(allowed), "milliseconds": found}


def _tiles(entries: list[dict[str, Any]]) -> dict[tuple[str, Any], Any]:
    """(kernel's name, case) -> tile of attention's entries in a table."""
    table = Table(document={"tiles": entries})
    return {
        (kernel.name, case): tile
        for kernel in KERNELS.values()
        for case, tile in table.tiles(kernel.name, kernel.case, kernel.parse).items()
    }

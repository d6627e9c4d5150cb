"""Tensors between pages that cannot be read: vector and masked loads at an edge access nothing beyond it, on every
instruction set. AddressSanitizer does not see these loads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import pytest
import torch
from cpp_entries import COLUMNS, entries
from guarded import Guarded, ends_by
from numerics import DTYPES

from phi_fast._C import cpu

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by Linux's C library")


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa("")


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_a_tensor_is_touched(isa: str, dtype: torch.dtype, at_end: bool) -> None:
    placed = [entry.placed(Guarded(at_end)) for entry in entries(dtype) if entry.needs()]
    assert placed
    if ends_by(lambda: [entry.call() for entry in placed]) == 0:
        return
    # One process ran them all, since a fork takes longer than a call. Now each has its own, which names the culprit.
    for entry in placed:
        assert ends_by(entry.call) == 0, f"{entry.name} with {isa}"
    raise AssertionError(f"all entries in one process end it with {isa}; none does alone")


def test_the_pages_are_there() -> None:
    """Accessing one element beyond either end of these tensors ends the process."""
    for at_end, offset in ((True, COLUMNS), (False, -1)):
        x = Guarded(at_end)(torch.zeros(COLUMNS))
        assert ends_by(lambda x=x, offset=offset: ctypes.string_at(x.data_ptr() + 4 * offset, 4)) != 0

"""Tensors between pages that cannot be read: vector and masked loads at an edge access nothing beyond it, on every
instruction set. AddressSanitizer does not see these loads."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from cpp_entries import COLUMNS, entries
from numerics import DTYPES
from torch import Tensor

from phi_fast._C import cpu

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by Linux's C library")
PAGE = mmap.PAGESIZE
NO_ACCESS = 0


class Guarded:
    """Copies of tensors that end just before a page without access, or begin just after one."""

    def __init__(self, at_end: bool) -> None:
        self._at_end, self._maps = at_end, []

    def __call__(self, x: Tensor) -> Tensor:
        """A copy with x's strides. Gaps between its rows can be accessed, memory after its last element cannot."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        size = extent * x.element_size()
        inside = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, inside + 2 * PAGE)
        self._maps.append(memory)
        view = torch.frombuffer(memory, dtype=torch.uint8)
        for guard in (0, PAGE + inside):
            address = ctypes.c_void_p(view.data_ptr() + guard)
            assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(PAGE), NO_ACCESS) == 0
        first = PAGE + (inside - size if self._at_end else 0)
        storage = view[first : first + size].view(x.dtype)
        return storage.as_strided(x.shape, x.stride()).copy_(x)


def ends_by(call: Callable[[], object]) -> int:
    """The signal that ends a child process that makes the call, or 0; if the call raises, minus its exit status."""
    child = os.fork()
    if not child:
        faulthandler.disable()  # the parent reports the signal
        try:
            call()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa("")


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_a_tensor_is_touched(isa: str, dtype: torch.dtype, at_end: bool) -> None:
    for entry in entries(dtype):
        if not entry.needs():
            continue
        placed = entry.placed(Guarded(at_end))
        assert ends_by(placed.call) == 0, f"{entry.name} with {isa}"


def test_the_pages_are_there() -> None:
    """Accessing one element beyond either end of these tensors ends the process."""
    for at_end, offset in ((True, COLUMNS), (False, -1)):
        x = Guarded(at_end)(torch.zeros(COLUMNS))
        assert ends_by(lambda x=x, offset=offset: ctypes.string_at(x.data_ptr() + 4 * offset, 4)) != 0

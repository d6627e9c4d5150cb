"""Tensors between pages that cannot be accessed, and what became of a process that tried."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
NO_ACCESS = 0
GUARD = 256 * PAGE
"""Wide enough that a step of a row or of a block of rows does not pass over it."""


class Guarded:
    """Copies of tensors that end just before a page without access, or begin just after one."""

    def __init__(self, at_end: bool) -> None:
        self._at_end, self._maps = at_end, []

    def __call__(self, x: Tensor) -> Tensor:
        """A copy with x's strides. Gaps between its rows can be accessed, memory after its last element cannot."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        size = extent * x.element_size()
        inside = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, inside + 2 * GUARD)
        self._maps.append(memory)
        view = torch.frombuffer(memory, dtype=torch.uint8)
        for guard in (0, GUARD + inside):
            address = ctypes.c_void_p(view.data_ptr() + guard)
            assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(GUARD), NO_ACCESS) == 0
        first = GUARD + (inside - size if self._at_end else 0)
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

"""Executes Triton kernels as compiled, on CPU tensors, by `ttsem`, and tells it what is particular to this project.

ttsem replaces Triton's launch. It compiles the kernel to TTIR for a GPU that is not there, executes that, and raises at
the kernel's line where an access leaves the tensors that were passed, or where two programs touch an element and one
of them writes it. This module adds five things:

- The memory behind Adam's tables of addresses, which ttsem cannot know.
- An access beside the slices that were passed of a packed buffer is a fault. ttsem alone checks the buffer's ends.
- Memory that nobody wrote is filled with NaNs (integers: a large number) of a bit pattern of our own, and a load of it
  is a fault at the kernel's line. With ttsem alone only the NaN in the result would tell.
- A kernel is compiled once per signature, as by Triton. ttsem alone compiles and parses it for every launch.
- A matrix product of tiles is summed in float64 and rounded once, so that only the kernel's own rounding remains. ttsem
  alone adds one product after another, as the fp32 units of a GPU do. But the bound of the tests is plain PyTorch's
  error on the same device, here the CPU, whose BLAS adds in other orders: single elements come out several times closer
  to float64 by that alone (docs/kernels.md has the figures).

The names used here are internal to ttsem; requirements.txt pins its version.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from ttsem import _fakedriver, harness, memory, mlir, ops, sanitize, values

from phi_fast.kernels import backend
from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.triton import adam

COMPUTE_CAPABILITY = 90

UNWRITTEN = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FE5),
    torch.float32: (torch.int32, 0x7FE5A5A5),
    torch.float64: (torch.int64, 0x7FFCA5A5A5A5A5A5),
    torch.int16: (torch.int16, 0x7A5A),
    torch.int32: (torch.int32, 0x7FA5A5A5),
    torch.int64: (torch.int64, 0x7FA5A5A5A5A5A5A5),
}
"""The bits of memory that nobody wrote, by dtype: a NaN that no arithmetic makes, or a large number. A byte has none
to spare."""

SOURCE_LINE = re.compile(r'loc\((?:callsite\(|"[^"]*"\()*"([^"]+)":(\d+):\d+')
"""File and line in an operation's location: of the innermost function, where the compiler inlined some."""

ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"))
ALLOCATORS += ((Tensor, "new_empty"), (Tensor, "new_empty_strided"))


@dataclass
class Tally:
    """What became of one kernel's launches."""

    launches: int = 0
    alone: int = 0
    """Launches of a single program, which has none to race with."""
    unchecked: Counter[str] = field(default_factory=Counter)
    """Launches too large to be checked for races, by the test that made them."""
    faults: Counter[str] = field(default_factory=Counter)
    """Messages of the launches that were stopped."""

    def add(self, launches: int, alone: int, unchecked: dict[str, int], faults: dict[str, int]) -> None:
        self.launches += launches
        self.alone += alone
        self.unchecked.update(unchecked)
        self.faults.update(faults)


def kernel_name(kernel: Any) -> str:
    """module.function of a `@triton.jit` function."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


class Checked(memory.Memory):
    """The memory of one launch, which also refuses loads of memory that nobody wrote, and accesses beside the tensors
    passed, in the memory that they are slices of."""

    passed: ClassVar[Sequence[Tensor]] = ()
    """The launch's tensors."""
    by_address: ClassVar[Sequence[Tensor]] = ()
    """Tensors that the launch reaches by addresses in a table. The kernel works on their own memory, not on a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.slices: list[np.ndarray | None] = []  # by buffer: the bytes that belong to a tensor; None: all of them
        for tensor in self.by_address:
            size, start = tensor.numel() * tensor.element_size(), tensor.storage_offset() * tensor.element_size()
            own = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (size,))
            super().register(tensor.data_ptr(), own.numpy())
            self.slices.append(None)

    def register(self, base: int, array: np.ndarray) -> None:
        super().register(base, array)
        belongs = np.zeros(array.nbytes, dtype=bool)
        for tensor in self.passed:
            if tensor.untyped_storage().data_ptr() == base:
                size, start = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
                strides = (*(stride * size for stride in tensor.stride()), 1)
                np.lib.stride_tricks.as_strided(belongs[start:], (*tensor.shape, size), strides)[...] = True
        self.slices.append(None if belongs.all() else belongs)

    def _resolve(self, addrs: np.ndarray, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        buffers, offsets = super()._resolve(addrs, itemsize)
        for buffer in np.unique(buffers):
            belongs = self.slices[buffer]
            if belongs is not None and (beside := ~belongs[offsets[buffers == buffer]]).any():
                raise values.Poison(f"{beside.sum()} element(s) beside the tensors passed, in memory that they share")
        return buffers, offsets

    def load(self, addrs: np.ndarray, mask: np.ndarray | None, other: object, dtype: np.dtype) -> np.ndarray:
        return _written(super().load(addrs, mask, other, dtype), mask)

    def atomic(self, kind: str, addrs: np.ndarray, values: object, mask: np.ndarray | None, *rest: Any, **options: Any):
        return _written(super().atomic(kind, addrs, values, mask, *rest, **options), mask)


def _written(loaded: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    patterns = [bits for kind, bits in UNWRITTEN.values() if kind.itemsize == loaded.dtype.itemsize]
    if patterns:
        unwritten = np.isin(loaded.view(f"i{loaded.dtype.itemsize}"), patterns)
        if mask is not None:
            unwritten &= np.broadcast_to(mask, unwritten.shape)
        if unwritten.any():
            raise values.Poison(f"{int(unwritten.sum())} element(s) of memory that nobody wrote are read")
    return loaded


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`allocate`, with memory whose bits tell that nobody wrote it."""

    @functools.wraps(allocate)
    def filled(*arguments: Any, **options: Any) -> Tensor:
        tensor = allocate(*arguments, **options)
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype in UNWRITTEN:
            kind, bits = UNWRITTEN[tensor.dtype]
            with torch.no_grad():
                tensor.detach().view(kind).fill_(bits)
        return tensor

    return filled


def _product(a: np.ndarray, b: np.ndarray, c: np.ndarray, accumulator: type) -> np.ndarray:
    """c + a b of (..., M, K) and (..., K, N), summed in float64 and rounded once."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return (np.matmul(a, b, dtype=np.float64) + c).astype(accumulator)


@contextlib.contextmanager
def session(tallies: dict[str, Tally], test: Callable[[], str], adam: ModuleType = adam) -> Iterator[None]:
    """While open, Triton's launches are executed by ttsem on CPU tensors and counted in `tallies` by kernel. `test`
    names the running test, `adam` is the module whose kernels take addresses."""
    tables: list[Tensor] = []
    compiled: dict[Any, str] = {}
    running = Tally()

    def step_(lists: AdamLists, options: AdamOptions, original: Callable[..., None] = adam.step_) -> None:
        tables[:] = [tensor for tensors in lists.tensors if tensors is not None for tensor in tensors]
        original(lists, options)

    def grad_norm_squared(grads: Sequence[Tensor], original: Callable[..., Tensor] = adam.grad_norm_squared) -> Tensor:
        tables[:] = grads
        return original(grads)

    def generic_ir(record: harness.LaunchRecord, stage: str, target: Any) -> str:
        nonlocal running
        running = tallies.setdefault(kernel_name(record.fn), Tally())
        running.add(1, math.prod(record.grid) == 1, {}, {})
        given = [getattr(value, "base", value) for value in record.bound.values()]  # base: a descriptor's tensor
        Checked.passed = [value for value in given if isinstance(value, Tensor)]
        Checked.by_address = tuple(tables) if "table" in record.bound else ()
        specialised = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = record.fn, repr(specialised)
        if key not in compiled:
            compiled[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return compiled[key]

    def stopped(stop: sanitize.KernelFault | sanitize.Unjudged) -> None:
        running.faults[str(stop)] += 1

    def unchecked() -> None:
        running.unchecked[test()] += 1

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            sanitize.session(
                COMPUTE_CAPABILITY, cuda_is_cpu=False, on_stop=stopped, on_unchecked=unchecked, inductor_lookback=False
            )
        )
        _fakedriver.unstub_torch_cuda()  # tensors are honest CPU tensors, and torch sees no GPU
        mlir.enable_generic_printing()
        replaced = [(owner, name, _filled(getattr(owner, name))) for owner, name in ALLOCATORS]
        replaced += [
            (adam, "step_", step_),
            (adam, "grad_norm_squared", grad_norm_squared),
            (backend, "triton_takes_cpu_tensors", lambda: True),
            (harness, "Memory", Checked),
            (harness, "ir_for_launch", generic_ir),
            (ops, "_fma_chain", _product),
            (sanitize, "_LOC", SOURCE_LINE),
            (mlir, "parse", functools.lru_cache(maxsize=None)(mlir.parse)),
        ]
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield

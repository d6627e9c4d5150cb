"""What every Triton module shares: how a launch is described, so that one description is run and cross-compiled.

A launcher builds a `Launch` and calls it. On meta tensors, which have no memory, there is nothing to run: the launch is
recorded for `codegen`, which compiles it for GPUs that are not there. What it reports is what runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_PROGRAMS = 2**31 - 1
"""Programs that the first axis of a grid holds; the others hold 65,535."""

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch: `launch()` runs it. Two are the same only by identity: tensors have no hash."""

    kernel: Any
    """The `@triton.jit` function."""
    grid: tuple[int]
    """Programs, along one axis."""
    arguments: dict[str, Any]
    """Run-time arguments by name: tensors, their descriptors, ints, floats, or None."""
    constants: dict[str, Any]
    """`tl.constexpr` arguments by name."""
    num_warps: int = 4
    num_stages: int = 1
    tile: Any = None
    """The tile that was chosen for it, where there is a choice (`tiles.Tunable`)."""

    def __call__(self) -> Any:
        """Launch on the tensors' GPU: Triton alone would launch on the current one, whose kernels may not read them.

        Meta tensors, or any in a `recording` of all: the launch is recorded. Raises RuntimeError for meta tensors
        outside of `recording`, ValueError for more programs than a grid holds.
        """
        if self.grid[0] > MOST_PROGRAMS:
            raise ValueError(
                f"{self.kernel.__name__} needs {self.grid[0]} programs, of {MOST_PROGRAMS}: split the rows"
            )
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        if device.type == "meta" or (_recordings and _recordings[-1].all):
            _recording().launches.append(self)
            return None
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self.kernel[self.grid](**self.arguments, **self.constants, **options)

    def signature(self) -> dict[str, str]:
        """Argument -> Triton's type, in the kernel's order, as `triton.compiler.ASTSource` wants it."""
        types = {name: _type(value) for name, value in self.arguments.items()} | dict.fromkeys(
            self.constants, "constexpr"
        )
        return {name: types[name] for name in self.kernel.arg_names}

    def constexprs(self) -> dict[str, Any]:
        """Values known when compiling: the constants, arguments that are None, and ints that are 1."""
        known = {name: value for name, value in self.arguments.items() if _type(value) == "constexpr"}
        return {**known, **self.constants}

    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Pointers and ints that are multiples of 16, by their index in the signature: they decide the access width."""
        index = {name: i for i, name in enumerate(self.kernel.arg_names)}
        aligned = (name for name, value in self.arguments.items() if _multiple_of_16(value))
        return {(index[name],): [["tt.divisibility", 16]] for name in aligned}


class _Recording(NamedTuple):
    architecture: str
    launches: list[Launch]
    all: bool


_recordings: list[_Recording] = []


@contextlib.contextmanager
def recording(architecture: str, *, all: bool = False) -> Iterator[list[Launch]]:
    """The launches that are made on meta tensors inside, as they would be made on a GPU of `architecture`.

    all: record those on tensors with memory too, and run none.
    """
    launches: list[Launch] = []
    _recordings.append(_Recording(architecture, launches, all))
    try:
        yield launches
    finally:
        _recordings.pop()


def _recording() -> _Recording:
    if not _recordings:
        raise RuntimeError("a kernel was launched on meta tensors, which have no memory: move them with .to_empty()")
    return _recordings[-1]


def recorded_architecture() -> str:
    """The architecture whose launches are recorded. Raises RuntimeError outside of `recording`."""
    return _recording().architecture


_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of an A100, an H100 (SXM), a B200 and an MI300X, by their data sheets."""


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU: those of an SXM or OAM module for launches that are recorded. The
    interpreter, on a CPU, runs one program after the other: 1."""
    return _MULTIPROCESSORS[recorded_architecture()] if device.type == "meta" else _multiprocessors(device)


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _multiple_of_16(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return (value.storage_offset() * value.element_size() + _base_address(value)) % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value != 1 and value % 16 == 0


def _base_address(value: torch.Tensor) -> int:
    """Meta tensors have no address; the allocators of the real ones align at least to 64 bytes."""
    return 0 if value.is_meta else value.untyped_storage().data_ptr()


def fp32_precision() -> str:
    """How Triton multiplies fp32: as torch's own switch says."""
    matmul = torch.backends.cuda.matmul  # from torch 2.9 on the older name raises where the newer one was set
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def next_power_of_2(n: int) -> int:
    """As triton.next_power_of_2, which takes 5 µs: launches wait for it."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def refuse_double(op: str, x: torch.Tensor) -> None:
    """Triton's kernels compute in fp32: raises TypeError for fp64."""
    if x.dtype == torch.float64:
        raise TypeError(f"{op} in Triton computes in fp32 and these tensors are float64; use('reference', op={op!r})")

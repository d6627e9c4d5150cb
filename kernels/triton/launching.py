"""Launches that are kept ready: at shapes seen before, only the tensors' addresses are new.

Triton binds a kernel's thirty arguments by name, looks at each one's type and alignment and at a dozen settings, on
every launch; with the description of the launch that is 50 to 150 µs of Python, longer than many a kernel runs. All of
it follows from what `launch` compares here, so the compiled kernel is called at once the second time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import Launch

MOST = 4096
"""Launches that are kept. Generation with ever new lengths would otherwise keep ever more of them."""

_HIP = torch.version.hip is not None


class Varying(float):
    """A number that is another at every launch, such as a learning rate: the kernel must take it as it is."""


class _Address(int):
    """The base of a tensor descriptor, which Triton asks for its address only."""

    def data_ptr(self) -> int:
        return self


class _Ready(NamedTuple):
    run: Callable[..., None]
    arguments: list[Any]
    """The kernel's arguments. None stands for a value that each launch gives; of a descriptor each launch gives the
    address."""
    places: list[tuple[int, Any]]
    """(index among the arguments, index among the values that `launch` reads)."""
    device: int

    def __call__(self, values: list[Any]) -> None:
        arguments = self.arguments.copy()
        for argument, value in self.places:
            descriptor = arguments[argument]
            arguments[argument] = values[value] if descriptor is None else _moved(descriptor, values[value])
        here = torch.cuda.current_device() == self.device
        with contextlib.nullcontext() if here else torch.cuda.device(self.device):
            self.run(*arguments)


def _moved(descriptor: TensorDescriptor, address: int) -> TensorDescriptor:
    """`descriptor`, of the tensor that lies at `address`."""
    moved = copy.copy(descriptor)
    moved.base = _Address(address)
    return moved


_ready: dict[tuple, _Ready] = {}


def launch(build: Callable[..., Launch], *arguments: Any) -> None:
    """Run the launch that `build(*arguments)` describes.

    arguments: tensors, None, hashable values, `Varying`, and tuples of these. What `build` makes of them may depend on
    everything but the addresses of the tensors (only on whether they are multiples of 16 bytes) and the values of
    `Varying`. A launch with a tensor that `build` made itself is described anew each time.
    """
    key: list[Any] = [build]
    changing: list[Tensor | Varying] = []
    values: list[Any] = []
    _read(arguments, key, changing, values)
    known = tuple(key)
    ready = _ready.get(known)
    if ready is not None:
        ready(values)
        return
    described = build(*arguments)
    compiled = described()
    if isinstance(compiled, CompiledKernel):  # not in the interpreter, and not where a launch is only recorded
        _keep(known, described, compiled, changing)


def forget() -> None:
    """Describe every launch anew, after a change to what a description reads beside its arguments."""
    _ready.clear()


def _read(arguments: Sequence[Any], key: list[Any], changing: list[Tensor | Varying], values: list[Any]) -> None:
    """Sort `arguments` into what decides the launch, and what is new each time with the value that the kernel gets."""
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            key.append((x.shape, x.stride(), x.dtype, address % 16 == 0, x.get_device(), _HIP and _small(x)))
            changing.append(x)
            values.append(address)
        elif isinstance(x, tuple | list):
            _read(x, key, changing, values)
        elif type(x) is Varying:
            changing.append(x)
            values.append(x)
        else:
            key.append(x)


def _small(x: Tensor) -> bool:
    """Whether offsets into x's storage fit 32 bits, for which Triton compiles other code on AMD."""
    return x.untyped_storage().nbytes() < 2**31


def _keep(key: tuple, described: Launch, compiled: CompiledKernel, changing: list[Tensor | Varying]) -> None:
    given = {id(x): index for index, x in enumerate(changing)}
    bound = {**described.arguments, **described.constants}
    arguments = [bound[name] for name in described.kernel.arg_names]
    new = (Tensor, Varying, TensorDescriptor)  # at every launch
    places = [(i, given.get(id(getattr(x, "base", x)))) for i, x in enumerate(arguments) if isinstance(x, new)]
    if any(value is None for _, value in places):
        return
    for i, _ in places:
        arguments[i] = _moved(arguments[i], 0) if isinstance(arguments[i], TensorDescriptor) else None
    if len(_ready) >= MOST:
        forget()
    device = next(x for x in changing if isinstance(x, Tensor)).get_device()
    _ready[key] = _Ready(compiled[(*described.grid, 1, 1)], arguments, places, device)

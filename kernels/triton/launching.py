"""Launches that are kept ready: at shapes seen before, only the tensors' addresses are new.

Triton binds a kernel's thirty arguments by name, looks at each one's type and alignment and at a dozen settings, on
every launch; with the description of the launch that is 50 to 150 µs of Python, longer than many a kernel runs. All of
it follows from what `launch` compares here, so the compiled kernel is called at once the second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .common import Launch

MOST = 4096
"""Launches that are kept. Generation with ever new lengths would otherwise keep ever more of them."""


_HIP = torch.version.hip is not None


class Varying(float):
    """A number that is another at every launch, such as a learning rate: the kernel must take it as it is."""


class _Ready(NamedTuple):
    run: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, int]]
    """(index among the arguments, index among the values that `launch` reads)."""
    device: int

    def __call__(self, values: list[Any]) -> None:
        arguments = self.arguments.copy()
        for argument, value in self.places:
            arguments[argument] = values[value]
        here = torch.cuda.current_device() == self.device
        with contextlib.nullcontext() if here else torch.cuda.device(self.device):
            self.run(*arguments)


_ready: dict[tuple, _Ready] = {}


def launch(build: Callable[..., Launch], *arguments: Any) -> None:
    """Run the launch that `build(*arguments)` describes.

    arguments: tensors, None, hashable values, `Varying`, and tuples of these. What `build` makes of them may depend on
    everything but the addresses of the tensors (only on whether they are multiples of 16 bytes) and the values of
    `Varying`. A launch with a tensor that `build` made itself is described anew each time.
    """
    key: list[Any] = [build]
    values: list[Any] = []
    _read(arguments, key, values)
    known = tuple(key)
    ready = _ready.get(known)
    if ready is not None:
        ready(values)
        return
    described = build(*arguments)
    compiled = described()
    if isinstance(compiled, CompiledKernel):  # not in the interpreter, and not where a launch is only recorded
        _keep(known, described, compiled, arguments)


def forget() -> None:
    """Describe every launch anew: for those who change what the descriptions read, as tile tables."""
    _ready.clear()


def _read(arguments: Sequence[Any], key: list[Any], values: list[Any]) -> None:
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            key.append((x.shape, x.stride(), x.dtype, address % 16 == 0, x.get_device(), _HIP and _small(x)))
            values.append(address)
        elif isinstance(x, tuple | list):
            _read(x, key, values)
        elif type(x) is Varying:
            values.append(x)
        else:
            key.append(x)


def _small(x: Tensor) -> bool:
    """Whether offsets into x's storage fit 32 bits, for which Triton compiles other code on AMD."""
    return x.untyped_storage().nbytes() < 2**31


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """The tensors and `Varying` of `arguments`, in the order of `_read`'s values."""
    found = []
    for x in arguments:
        if isinstance(x, tuple | list):
            found += _flat(x)
        elif isinstance(x, Tensor | Varying):
            found.append(x)
    return found


def _keep(key: tuple, described: Launch, compiled: CompiledKernel, arguments: Sequence[Any]) -> None:
    given = {id(x): index for index, x in enumerate(_flat(arguments))}
    bound = {**described.arguments, **described.constants}
    values = [bound[name] for name in described.kernel.arg_names]
    changing = [(i, x) for i, x in enumerate(values) if isinstance(x, Tensor | Varying)]
    if any(id(x) not in given for _, x in changing):
        return
    device = next(x for _, x in changing if isinstance(x, Tensor)).get_device()
    if len(_ready) >= MOST:
        forget()
    template = [None if isinstance(x, Tensor | Varying) else x for x in values]
    run = compiled[(*described.grid, 1, 1)]
    _ready[key] = _Ready(run, template, [(i, given[id(x)]) for i, x in changing], device)

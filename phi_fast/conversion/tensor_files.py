"""Reads the two kinds of weight files: names, shapes and dtypes first, then slices without reading the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names for the dtypes that weights can have."""


class Header(NamedTuple):
    """A file's description of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A torch.dtype if it is one of `FLOATS`, else the file's name for it."""


class TensorFile(Protocol):
    """Gives headers and slices of the tensors in a file."""

    def headers(self) -> dict[str, Header]: ...

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor: ...


class SafetensorsFile:
    """A .safetensors file. Each read opens it anew, so that pages of earlier reads do not stay mapped.

    The safetensors library compares the shapes in the header with the file's size when it opens a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def headers(self) -> dict[str, Header]:
        with self._open() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                name: Header(tuple(part.get_shape()), FLOATS.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        with self._open() as file:
            part = slice(start, start + length)
            tensor = file.get_slice(name)[part] if dim == 0 else file.get_slice(name)[:, part]
            return tensor.clone()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except SafetensorError as error:
            raise ConversionError(f"{self.path} is damaged or cut short: {error}. Get it again") from error


class TorchFile:
    """A .bin file, in which the older layouts were published: memory-mapped, and only tensors are unpickled."""

    def __init__(self, path: Path) -> None:
        try:
            self.tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ConversionError(
                f"{path} is damaged, or holds more than tensors, which is never unpickled ({type(error).__name__}): "
                "get it again, or the model's safetensors"
            ) from error
        if not isinstance(self.tensors, dict) or not all(isinstance(value, Tensor) for value in self.tensors.values()):
            raise ConversionError(f"{path} does not hold a state dict of named tensors: save only the state dict")
        size, announced = path.stat().st_size, sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())
        if announced > size:  # an expanded tensor shows one stored number as many elements
            raise ConversionError(
                f"{path} has {size:,} bytes, and its tensors would take {announced:,}: save them without shared or "
                "expanded storage"
            )

    def headers(self) -> dict[str, Header]:
        return {
            name: Header(tuple(tensor.shape), tensor.dtype if tensor.dtype in FLOATS.values() else str(tensor.dtype))
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self.tensors[name].narrow(dim, start, length).clone()

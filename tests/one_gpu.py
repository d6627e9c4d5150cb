"""A pytest plugin that runs tests as on a machine with one GPU, on a CPU: `python -m pytest -p one_gpu tests/kernels`.

Tensors that a test puts on CUDA are CPU tensors that claim to be on cuda:0; Triton's kernels run on them in Triton's
interpreter. What a real GPU would refuse is refused: an op that mixes tensors of both, a second GPU, C++ kernels on a
GPU's tensors. Numbers are the CPU's: streams, graphs and autocast on CUDA cannot be had so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_iter, tree_map

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_MAY_MIX = {
    "copy_",
    "__setitem__",
    "__getitem__",
    "index_put_",
    "to",
    "type_as",
    "__get__",
    "__set__",
    "__deepcopy__",
    "_has_compatible_shallow_copy_type",
}
"""Functions that take tensors of several devices: those that copy, and look-ups by indices on the CPU."""
_OF_ONE_DEVICE = {"equal", "cat", "stack", "allclose", "linear", "mm", "matmul"}
"""Functions in which not even a tensor without dims may be on the CPU beside CUDA's."""
_TO_CPU = {"cpu", "numpy", "tolist", "item", "__array__", "pin_memory"}


class WrongDevice(RuntimeError):
    """What a machine with one GPU would refuse."""


class OneGpu(TorchFunctionMode):
    """Keeps, by storage, which tensors claim to be on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, StorageWeakRef] = {}

    def claims(self, tensor: Tensor) -> bool:
        """Whether a tensor claims to be on the GPU."""
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # meta, sparse and wrapped tensors have none
            return False
        reference = self._there.get(key)
        if reference is not None and reference.expired():
            del self._there[key]
            reference = None
        return reference is not None

    def put(self, tensor: Tensor) -> Tensor:
        """Let a CPU tensor with storage claim to be on the GPU."""
        if (
            type(tensor).__module__.startswith("torch")
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
        ):
            storage = tensor.untyped_storage()
            self._there[storage._cdata] = StorageWeakRef(storage)
            if len(self._there) > 100_000:
                self._there = {key: ref for key, ref in self._there.items() if not ref.expired()}
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name in ("device", "_parse_to"):  # names of devices, and nothing on them
            found = func(*args, **kwargs)
            return (CUDA, *found[1:]) if first is not None and self.claims(first) else found
        if func == Tensor.device.__get__:
            return CUDA if self.claims(first) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.claims(first)
        if func == Tensor.get_device:
            return 0 if self.claims(first) else func(*args)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        there = [self.claims(x) for x in tensors]
        if name in ("to", "cuda", "cpu", "pin_memory") and first is not None:
            return self._move(func, name, args, kwargs)
        if name in ("mm", "addmm", "bmm") and any(there) and (wide := kwargs.pop("out_dtype", None)):
            args = tree_map(lambda x: x.to(wide) if isinstance(x, Tensor) else x, args)  # which a CPU has no kernel for
        asked = _device_of(args, kwargs)
        if asked is not None and asked.type == "cuda":
            args, kwargs = tree_map(lambda x: CPU if _is_cuda(x) else x, (args, kwargs))
        elif asked is None:
            self._refuse_mixing(func, name, tensors, there)
        result = func(*args, **kwargs)
        on_gpu = asked.type == "cuda" if asked is not None else any(there) and name not in _TO_CPU
        if on_gpu:
            fresh = result if asked is None else _apart(result, tensors)
            return tree_map(lambda x: self.put(x) if isinstance(x, Tensor) else x, fresh)
        return result

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor = args[0]
        was = self.claims(tensor)
        target = CUDA if name == "cuda" else CPU if name in ("cpu", "pin_memory") else _device_of(args[1:], kwargs)
        others = [x for x in args[1:] if isinstance(x, Tensor)]
        if target is None and others:
            target = CUDA if self.claims(others[0]) else others[0].device
        if name != "to":
            moved = tensor
        else:
            words = tree_map(lambda x: CPU if _is_cuda(x) else x, (args, kwargs))
            moved = func(*words[0], **words[1])
        becomes = was if target is None else target.type == "cuda"
        if becomes != was and moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            moved = moved.clone()
        return self.put(moved) if becomes else moved

    def _refuse_mixing(self, func: Any, name: str, tensors: list[Tensor], there: list[bool]) -> None:
        if name in _MAY_MIX or not any(there):
            return
        for tensor, on_gpu in zip(tensors, there, strict=True):
            small = tensor.dim() == 0 and name not in _OF_ONE_DEVICE
            if not on_gpu and not small and tensor.device.type == "cpu":
                where = resolve_name(func) or name
                raise WrongDevice(f"{where}: a tensor {tuple(tensor.shape)} is on the CPU, others are on cuda:0")


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str) and value.split(":")[0] != "cuda":
        return False
    if not isinstance(value, str | torch.device):
        return False
    device = torch.device(value)
    if device.type == "cuda" and device.index not in (None, 0):
        raise WrongDevice(f"{device}: this machine has one GPU")
    return device.type == "cuda"


def _device_of(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    for value in (kwargs.get("device"), *args):
        if isinstance(value, torch.device) or (
            isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu", "meta")
        ):
            _is_cuda(value)
            return torch.device(value)
    return None


def _apart(result: Any, inputs: list[Tensor]) -> Any:
    """A result with memory of its own, so that its claim is not its inputs'."""
    known = {x.untyped_storage()._cdata for x in inputs if x.layout == torch.strided and not x.is_meta}
    if isinstance(result, Tensor) and result.layout == torch.strided and not result.is_meta:
        return result.clone() if result.untyped_storage()._cdata in known else result
    return result


@contextmanager
def one_gpu() -> Iterator[OneGpu]:
    """The machine, as torch sees it inside."""
    patch = pytest.MonkeyPatch()
    properties = SimpleNamespace(
        L2_cache_size=40 << 20, multi_processor_count=108, total_memory=80 << 30, major=8, minor=0
    )
    known = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "NVIDIA A100",
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "set_device": _is_cuda_index,
        "device": lambda device: nullcontext(),
    }
    for name, value in known.items():
        patch.setattr(torch.cuda, name, value)
    mode = OneGpu()
    try:
        yield mode
    finally:
        patch.undo()


def _is_cuda_index(device: Any) -> None:
    if device not in (0, "cuda", "cuda:0", torch.device("cuda"), CUDA):
        raise WrongDevice(f"{device}: this machine has one GPU")


# From here on, since tests make tensors while they are collected.
_machine = one_gpu()
_machine.__enter__().__enter__()

"""CUDA graphs without a GPU: what a function did to tensors on the CPU is repeated, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 2


class Recorder(TorchDispatchMode):
    """Records torch's operations, with arguments and results. To read a tensor's value fails, as in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operation, and write each result to where the first one lies."""
        for func, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Stand in for `cuda_graphs.capture`: a replay runs none of the Python of `run`; C++ kernels are not seen."""
    for _ in range(WARM_UP):
        run()
    recorder = Recorder()
    with recorder:
        run()
    return recorder.replay


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """Stand in for `cuda_graphs.capture` with any kernels: a replay is another run."""
    for _ in range(WARM_UP):
        run()
    return run

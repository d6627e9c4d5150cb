"""`python -m benchmarks.gpu.kernel_cache`: compile for sm_90 what `verify` and phi-1.5's step launch, into Triton's
cache.

The launches are recorded on meta tensors of the same shapes, and go through the JIT as on a GPU, whose driver a stub
stands in for: `triton.compile` alone would store them under other keys. TRITON_CACHE_DIR says where.
"""

from __future__ import annotations

import json
import sys
from base64 import b32encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from phi_fast import Phi, PhiConfig
from phi_fast.kernels import FusedAdam, backend, dispatch, fuse_rotary, use
from phi_fast.kernels.adam import grad_norm_squared
from phi_fast.kernels.triton.common import Launch, recording
from phi_fast.kernels.triton.specimens import specimens
from phi_fast.precision import DTYPES
from phi_fast.verification.cases import cases
from phi_fast.verification.judge import cast

ARCHITECTURE, CAPABILITY = "sm_90", 90
META, CUDA = torch.device("meta"), torch.device("cuda")


def launches() -> Iterator[Launch]:
    """Yield the launches of `verify` on a GPU, and of a training step of phi-1.5."""
    with meta_as_a_gpu(), use("triton"), recording(ARCHITECTURE) as found:
        for dtype in DTYPES.values():
            for case in cases(CUDA):
                with META:
                    inputs = cast(case.inputs(None), dtype, META)  # type: ignore[arg-type]  # nothing is drawn
                case.ours(inputs)
        for dtype in (torch.float16, torch.bfloat16):
            for inside in (False, True):
                with fuse_rotary(inside):
                    _step(dtype)
    yield from found
    for dtype in (torch.float16, torch.bfloat16):
        yield from (specimen.launch for specimen in specimens(ARCHITECTURE, dtype))


def _step(dtype: torch.dtype) -> None:
    """One layer of phi-1.5, loss, gradients and update: the other layers launch the same."""
    with META:
        model = Phi(PhiConfig.preset("phi-1.5").replace(num_hidden_layers=1)).to(dtype)
        ids = torch.zeros(4, 2048, dtype=torch.int64)
    model(ids, ids).loss.backward()
    optimizer = FusedAdam(model.parameters(), lr=1e-4, master_weights=True)
    grad_norm_squared([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()


@contextmanager
def meta_as_a_gpu() -> Iterator[None]:
    """Let the ops run their kernels on meta tensors, which they else hand to torch's library for their shapes."""
    adam = sys.modules["phi_fast.kernels.adam"]
    with ExitStack() as stack:
        for name in ("by_library", "backward_by_library"):
            stack.enter_context(mock.patch.object(dispatch, name, lambda *_, **__: False))
        run = lambda device: backend.implementation("adam", device)  # noqa: E731
        stack.enter_context(mock.patch.object(adam, "_kernels", run))
        yield


def compile_all(found: Iterator[Launch]) -> list[str]:
    """Compile each launch as the JIT does at its first run; the folders of the cache that hold them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", CAPABILITY, 32)
    stub = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    driver.set_active(stub)
    folders = {}
    for launch in found:
        arguments = {name: _stand_in(value) for name, value in launch.arguments.items()}
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        kernel = launch.kernel.warmup(grid=launch.grid, **arguments, **launch.constants, **options)
        folders[b32encode(bytes.fromhex(kernel.hash)).decode().rstrip("=")] = None
    return list(folders)


def _stand_in(value: Any) -> Any:
    """Stands in for a tensor with what the JIT looks at: its dtype, and whether its address is a multiple of 16."""
    if not isinstance(value, Tensor):
        return value
    offset = value.storage_offset() * value.element_size()
    return SimpleNamespace(dtype=value.dtype, data_ptr=lambda: offset, ptr_range=lambda: 2**40)


if __name__ == "__main__":
    print(json.dumps(compile_all(launches())))

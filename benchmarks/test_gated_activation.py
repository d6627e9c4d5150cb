"""silu(gate) · up over phi-1.5's MLP width, as Llama's MLP computes it, on two tensors.

Bytes: the forward reads gate and up and writes the result; the backward reads both and the result's gradient and writes
two gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import sizes
from benchmarks.harness import Results
from benchmarks.ops import DTYPES, Cost, Op, leaf, measure
from benchmarks.peers import NOT_COMPILED, backends, compiled, peer
from benchmarks.timing import device
from phi_fast.kernels import gated_activation

pytestmark = pytest.mark.usefixtures("kept_memory")


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger_op(gate: Tensor, up: Tensor) -> Op:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return Op(lambda: LigerSiLUMulFunction.apply(gate, up), [gate, up])


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_gated_activation(dtype: str, full: bool, results: Results) -> None:
    where = device()
    rows, n = (4096, 8192) if full else (32, 256)
    gate, up = (leaf(rows, n, dtype=DTYPES[dtype], device=where) for _ in range(2))
    fast = compiled(eager, full)
    ops: dict[str, Op | str] = {
        label: Op(lambda: gated_activation(gate, up), [gate, up], backend=("gated_activation", name))
        for label, name in backends("gated_activation", where).items()
    }
    ops |= {
        "torch eager": Op(lambda: eager(gate, up), [gate, up], note="also transformers'"),
        "torch.compile": Op(lambda: fast(gate, up), [gate, up]) if fast else NOT_COMPILED,
        "Liger-Kernel": peer("liger_kernel", lambda: liger_op(gate, up)),
    }
    size = gate.numel() * gate.element_size()
    measure(
        f"gated_activation, {dtype}",
        ops,
        torch.randn_like(gate),
        results,
        costs=(Cost(3 * size), Cost(5 * size)),
        config={"rows": rows, "width": n},
        full=full,
    )

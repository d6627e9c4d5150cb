"""gelu(x + bias) in its tanh form, over phi-1.5's MLP width.

Bytes: the forward reads x and writes the result; the backward reads x and the result's gradient and writes the gradient
of x. The rows "into given memory" call the kernel as the parallel block does: without a bias (the matrix product has
added it), without allocation, and with a backward that also writes the activation again.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from benchmarks import sizes
from benchmarks.harness import Results
from benchmarks.ops import DTYPES, Cost, Op, leaf, measure
from benchmarks.peers import NOT_COMPILED, absent, backends, compiled, peer
from benchmarks.subjects import Contender
from benchmarks.timing import device
from phi_fast.kernels import backend, bias_gelu

pytestmark = pytest.mark.usefixtures("kept_memory")


def eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def transformers(x: Tensor, bias: Tensor) -> Tensor:
    """phi's `hidden_act`."""
    return ACT2FN["gelu_new"](x + bias)


def megatron(x: Tensor, bias: Tensor) -> Tensor:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    return bias_gelu_impl(x, bias)


def in_given_memory(x: Tensor, dout: Tensor) -> tuple[dict, dict]:
    """The default back end's kernels, which write into existing memory."""
    kernel = backend.implementation("bias_gelu", x.device)
    x = x.detach()
    out, dx, activation = (torch.zeros_like(x) for _ in range(3))
    size = x.numel() * x.element_size()
    forward = Contender(lambda: kernel.forward(x, None, out=out), 2 * size, note="without a bias")
    backward = Contender(
        lambda: kernel.backward(dout, x, None, dx=dx, activation=activation), 4 * size, note="writes the activation too"
    )
    return {"phi_fast, into given memory": forward}, {"phi_fast, into given memory": backward}


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_bias_gelu(dtype: str, full: bool, results: Results) -> None:
    where = device()
    rows, n = (4096, 8192) if full else (32, 256)
    x, bias = leaf(rows, n, dtype=DTYPES[dtype], device=where), leaf(n, dtype=DTYPES[dtype], device=where)
    dout = torch.randn_like(x)
    fast = compiled(eager, full)
    ops: dict[str, Op | str] = {
        label: Op(lambda: bias_gelu(x, bias), [x, bias], backend=("bias_gelu", name))
        for label, name in backends("bias_gelu", where).items()
    }
    ops |= {
        "torch eager": Op(lambda: eager(x, bias), [x, bias], note="also litgpt's"),
        "torch.compile": Op(lambda: fast(x, bias), [x, bias]) if fast else NOT_COMPILED,
        "transformers gelu_new": Op(lambda: transformers(x, bias), [x, bias]),
        "Megatron bias_gelu": peer("megatron", lambda: megatron_op(x, bias, full)),
        "Liger-Kernel": absent("liger_kernel") or "has only GEGLU, no GELU of one input",
    }
    size = x.numel() * x.element_size()
    measure(
        f"bias_gelu, {dtype}",
        ops,
        dout,
        results,
        costs=(Cost(2 * size), Cost(3 * size)),
        config={"rows": rows, "width": n},
        full=full,
        more=in_given_memory(x, dout),
    )


def megatron_op(x: Tensor, bias: Tensor, full: bool) -> Op | str:
    return Op(lambda: megatron(x, bias), [x, bias], note="its fuser is torch.compile") if full else NOT_COMPILED

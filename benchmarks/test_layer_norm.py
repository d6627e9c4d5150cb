"""LayerNorm and RMSNorm over phi-1.5's width. transformers and litgpt call torch's LayerNorm: "torch eager".

Bytes: the forward reads x and writes the result; the backward reads x and the result's gradient and writes the gradient
of x. The rows "into given memory" call the kernel as the parallel block does: without allocation, and with the
residual's gradient added, which is one more read.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import sizes
from benchmarks.harness import Results
from benchmarks.ops import DTYPES, Cost, Op, leaf, measure
from benchmarks.peers import NOT_COMPILED, absent, backends, compiled, peer
from benchmarks.subjects import Contender
from benchmarks.timing import device
from phi_fast.kernels import backend, layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("kept_memory")

EPS = 1e-5


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, weight, bias, EPS)


def flash_attn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, eps=EPS)


def in_given_memory(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> tuple[dict, dict]:
    """The default back end's kernels, which write into existing memory."""
    kernel = backend.implementation("layer_norm", x.device)
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    out, dx, residual_grad = (torch.zeros_like(x) for _ in range(3))
    _, mean, rstd = kernel.forward(x, weight, bias, EPS)
    size = x.numel() * x.element_size()

    def backward() -> object:
        return kernel.backward(dout, x, weight, mean, rstd, residual_grad=residual_grad, dx=dx)

    forward = Contender(lambda: kernel.forward(x, weight, bias, EPS, out=out), 2 * size)
    return (
        {"phi_fast, into given memory": forward},
        {"phi_fast, into given memory": Contender(backward, 4 * size, note="with the residual's gradient")},
    )


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_layer_norm(dtype: str, full: bool, results: Results) -> None:
    where = device()
    rows, d = (8192, 2048) if full else (64, 128)
    x, weight, bias = (leaf(*shape, dtype=DTYPES[dtype], device=where) for shape in ((rows, d), (d,), (d,)))
    dout = torch.randn_like(x)
    inputs = (x, weight, bias)
    fast = compiled(eager, full)

    def through(name: str) -> Op:
        return Op(lambda: layer_norm(*inputs, EPS), inputs, backend=("layer_norm", name))

    ops: dict[str, Op | str] = {label: through(name) for label, name in backends("layer_norm", where).items()}
    ops |= {
        "torch eager": Op(lambda: eager(*inputs), inputs, note="also transformers' and litgpt's"),
        "torch.compile": Op(lambda: fast(*inputs), inputs) if fast else NOT_COMPILED,
        "Liger-Kernel": peer("liger_kernel", lambda: Op(lambda: liger(*inputs), inputs)),
        "flash-attn": peer("flash_attn", lambda: Op(lambda: flash_attn(*inputs), inputs)),
        "NVIDIA apex": absent("amp_C") or "the row through phi_fast",
    }
    size = x.numel() * x.element_size()
    measure(
        f"layer_norm, {dtype}",
        ops,
        dout,
        results,
        costs=(Cost(2 * size), Cost(3 * size)),
        config={"rows": rows, "width": d},
        full=full,
        more=in_given_memory(x, weight, bias, dout),
    )


def eager_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def transformers_rms(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm's forward."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def liger_rms(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, EPS)


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_rms_norm(dtype: str, full: bool, results: Results) -> None:
    where = device()
    rows, d = (8192, 2048) if full else (64, 128)
    inputs = tuple(leaf(*shape, dtype=DTYPES[dtype], device=where) for shape in ((rows, d), (d,)))
    fast = compiled(eager_rms, full)
    ops: dict[str, Op | str] = {
        label: Op(lambda: rms_norm(*inputs, EPS), inputs, backend=("layer_norm", name))
        for label, name in backends("layer_norm", where).items()
        if name in backend.BACKENDS  # others have LayerNorm only
    }
    ops |= {
        "torch eager": Op(lambda: eager_rms(*inputs), inputs),
        "torch.compile": Op(lambda: fast(*inputs), inputs) if fast else NOT_COMPILED,
        "transformers": Op(lambda: transformers_rms(*inputs), inputs),
        "Liger-Kernel": peer("liger_kernel", lambda: Op(lambda: liger_rms(*inputs), inputs)),
    }
    size = inputs[0].numel() * inputs[0].element_size()
    measure(
        f"rms_norm, {dtype}",
        ops,
        torch.randn_like(inputs[0]),
        results,
        costs=(Cost(2 * size), Cost(3 * size)),
        config={"rows": rows, "width": d},
        full=full,
    )

"""The CPU kernels against the copy bandwidth of the same run, and against torch's own ops (DeepSpeed's for Adam).

GB/s count what the operation must read and write once. Full size is beyond any cache; a copy writes what it reads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Results, compare
from phi_fast._C import cpu
from phi_fast.kernels.cpp import adam, bias_gelu, layer_norm, linear_cross_entropy, rotary
from phi_fast.kernels.rotary import rotary_table

Contenders = dict[str, Callable[[], object] | str]
Case = tuple[Contenders, dict[str, int]]
"""Contenders, and the bytes each must move; "copy" is the yardstick."""

ADAM = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}


def copy(size: int) -> tuple[Callable[[], object], int]:
    """A copy that moves `size` bytes: half of them read, half written."""
    source, target = torch.ones(size // 2, dtype=torch.uint8), torch.zeros(size // 2, dtype=torch.uint8)
    return lambda: target.copy_(source), 2 * source.numel()


def layer_norm_case(dtype: torch.dtype, full: bool) -> Case:
    rows, d = (16384, 2048) if full else (64, 128)
    x, out, dy, residual_grad = (torch.randn(rows, d).to(dtype) for _ in range(4))
    weight, bias = torch.ones(d, dtype=dtype), torch.zeros(d, dtype=dtype)
    _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5)
    native = torch.ops.aten.native_layer_norm_backward
    statistics = [s[:, None].to(dtype) for s in (mean, rstd)]  # torch wants them in the dtype of its weight
    size = x.numel() * dtype.itemsize
    contenders: Contenders = {
        "forward": lambda: layer_norm.forward(x, weight, bias, 1e-5, out=out),
        "torch forward": lambda: F.layer_norm(x, (d,), weight, bias),
        "backward, residual's gradient added": lambda: layer_norm.backward(
            dy, x, weight, mean, rstd, residual_grad=residual_grad, dx=out
        ),
        "torch backward, without it": lambda: native(dy, x, (d,), *statistics, weight, bias, (True, True, True)),
    }
    return contenders, dict(zip(contenders, (2 * size, 2 * size, 4 * size, 3 * size), strict=True))


def bias_gelu_case(dtype: torch.dtype, full: bool) -> Case:
    rows, n = (4096, 8192) if full else (32, 256)
    x, dout, out, activation = (torch.randn(rows, n).to(dtype) for _ in range(4))
    bias = torch.randn(n).to(dtype)
    gelu_backward = torch.ops.aten.gelu_backward
    size = x.numel() * dtype.itemsize

    def torch_backward() -> Tensor:
        u = x + bias
        return gelu_backward(dout, u, approximate="tanh").sum(0)

    contenders: Contenders = {
        "forward": lambda: bias_gelu.forward(x, bias, out=out),
        "torch forward": lambda: F.gelu(x + bias, approximate="tanh"),
        "backward, activation again": lambda: bias_gelu.backward(dout, x, bias, dx=out, activation=activation),
        "torch backward, without it": torch_backward,
    }
    return contenders, dict(zip(contenders, (2 * size, 2 * size, 4 * size, 3 * size), strict=True))


def rotary_case(dtype: torch.dtype, full: bool) -> Case:
    batch, sequence, heads = (8, 2048, 32) if full else (2, 16, 4)
    qkv = torch.randn(batch, sequence, 7 * heads * 64).to(dtype)[..., : 2 * heads * 64]
    x = qkv.unflatten(-1, (2 * heads, 64))
    cos, sin = rotary_table(sequence, 32)
    wide_cos, wide_sin = (torch.cat((t, t), -1)[:, None].to(dtype) for t in (cos, sin))

    def torch_rotary() -> Tensor:
        turning, rest = x[..., :32], x[..., 32:]
        a, b = turning.chunk(2, -1)
        return torch.cat((turning * wide_cos + torch.cat((-b, a), -1) * wide_sin, rest), -1)

    contenders: Contenders = {
        "in place": lambda: rotary.rotate_(x, cos, sin, 0),
        "torch, as transformers writes it": torch_rotary,
    }
    size = x.numel() // 2 * dtype.itemsize  # half of each head turns
    return contenders, dict.fromkeys(contenders, 2 * size)


def cross_entropy_case(dtype: torch.dtype, full: bool) -> Case:
    rows, vocab = (1024, 51200) if full else (8, 512)
    logits = torch.randn(rows, vocab).to(dtype)
    scratch = logits.clone()
    labels = torch.randint(vocab, (rows,))
    dbias, one = torch.zeros(vocab), torch.ones(())

    def ours() -> None:
        linear_cross_entropy.cross_entropy_(
            scratch,
            labels,
            ignore_index=-100,
            label_smoothing=0.0,
            z_loss=0.0,
            scale=one,
            need_grad=True,
            dbias=dbias,
        )

    def theirs() -> None:
        leaf = logits.detach().requires_grad_()
        F.cross_entropy(leaf.float(), labels, reduction="sum").backward()

    contenders: Contenders = {"losses, gradient, bias's gradient": ours, "torch losses, gradient": theirs}
    return contenders, dict.fromkeys(contenders, 2 * logits.numel() * dtype.itemsize)


def adam_case(dtype: torch.dtype, full: bool) -> Case:
    n = 50_000_000 if full else 4096
    low = dtype != torch.float32
    master, grad, param = torch.randn(n), torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    exp_avg, exp_avg_sq, one = torch.zeros(n), torch.zeros(n), torch.ones(())
    lists = ([param], [grad], [exp_avg], [exp_avg_sq], [master] if low else None)
    theirs = torch.nn.Parameter(torch.randn(n))
    theirs.grad = torch.randn(n)
    fused = torch.optim.AdamW([theirs], fused=True, **ADAM)
    ours = "unscale, clip, skip" + (", 16-bit weights from the fp32 master" if low else "")
    contenders: Contenders = {
        ours: lambda: adam.step_(*lists, step=one, decoupled=True, grad_scale=one, found_inf=one - 1, **ADAM),
        "torch fused AdamW, fp32": fused.step,
        "DeepSpeedCPUAdam, fp32": deepspeed_adam(theirs, full),
        "norm of the gradient": lambda: adam.grad_norm_squared([grad]),
    }
    # m and v read and written, the gradient read; the fp32 value read and written, and 16-bit weights written
    ours_bytes, peer = (16 + dtype.itemsize + 8 + (dtype.itemsize if low else 0)) * n, 28 * n
    return contenders, dict(zip(contenders, (ours_bytes, peer, peer, dtype.itemsize * n), strict=True))


def deepspeed_adam(param: torch.nn.Parameter, full: bool) -> Callable[[], object] | str:
    """Its step, or why there is none: it is compiled when first made, which takes a minute."""
    if not full:
        return "compiled in the full run only"
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam([param], **ADAM).step
    except Exception as error:  # whatever a compiler may raise is the row's note
        return f"does not build here: {type(error).__name__}"


CASES = {
    "layer_norm": layer_norm_case,
    "bias_gelu": bias_gelu_case,
    "rotary": rotary_case,
    "cross_entropy": cross_entropy_case,
    "adam": adam_case,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_bandwidth(name: str, dtype: torch.dtype, full: bool, results: Results) -> None:
    contenders, moved = CASES[name](dtype, full)
    run_copy, copied = copy(2**28 if full else 2**14)
    config = {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "isa": cpu.isa()}
    subject = compare(
        f"CPU {name} {config['dtype']}", {"copy": run_copy, **contenders}, config=config, repeats=15 if full else 1
    )
    moved["copy"] = copied
    speeds = {row.name: moved[row.name] / row.median / 1e9 for row in subject.rows if row.median}
    for row in subject.rows:
        if row.name in speeds:
            row.extra = {
                "GB/s": f"{speeds[row.name]:.1f}",
                "of copy": f"{100 * speeds[row.name] / speeds['copy']:.0f}%",
            }
    results.add(subject)

"""Triton's kernels compute in fp32 and round to 16 bits once, to the nearest, when they store.

An error bound of twice plain PyTorch's lets through a result that was cut off instead of rounded, and an intermediate
number in 16 bits where plain PyTorch has one too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import Case, run
from numerics import double, gradients
from torch import Tensor

pytest.importorskip("triton")
from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.layer_norm import ResidualStream
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.triton import adam, bias_gelu, gated_activation, layer_norm, linear_cross_entropy, muon, rotary

Draw = Callable[..., Tensor]


def turn(draw: Draw) -> dict[str, Tensor]:
    cos, sin = draw(10, 16), draw(10, 16)
    results = {"halves": draw(2, 10, 3, 40), "pairs": draw(2, 10, 3, 40), "inverse": draw(2, 10, 3, 40)}
    for name, x in results.items():
        rotary.rotate_(x, cos, sin, 0, interleaved=name == "pairs", inverse=name == "inverse")
    return results


def normalise(draw: Draw) -> dict[str, Tensor]:
    x, weight, bias = draw(30, 100), draw(100), draw(100)
    stream = ResidualStream(shift=draw(100), shifted=torch.empty_like(x))
    out, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5, stream)
    dx, dweight, dbias = layer_norm.backward(draw(30, 100), x, weight, mean, rstd, residual_grad=draw(30, 100))
    return {"out": out, "shifted": stream.shifted, "dx": dx, "dweight": dweight, "dbias": dbias}


def activate(draw: Draw, form: str) -> dict[str, Tensor]:
    x, bias = draw(30, 100), draw(100)
    out, again = bias_gelu.forward(x, bias, approximate=form), torch.empty_like(x)
    dx, dbias = bias_gelu.backward(draw(30, 100), x, bias, activation=again, approximate=form)
    return {"out": out, "again": again, "dx": dx, "dbias": dbias}


def normalise_without_mean(draw: Draw) -> dict[str, Tensor]:
    x, weight = draw(30, 100), draw(100)
    out, _, rstd = layer_norm.forward(x, weight, None, 1e-6)
    dx, dweight, _ = layer_norm.backward(draw(30, 100), x, weight, None, rstd, residual_grad=draw(30, 100))
    return {"out": out, "dx": dx, "dweight": dweight}


def gate(draw: Draw, activation: str) -> dict[str, Tensor]:
    gate, up, dout = draw(30, 100), draw(30, 100), draw(30, 100)
    out = gated_activation.forward(gate, up, activation=activation)
    dgate, dup = gated_activation.backward(dout, gate, up, activation=activation)
    return {"out": out, "dgate": dgate, "dup": dup}


def cross_entropy(draw: Draw, **options: float) -> dict[str, Tensor]:
    """The gradient is multiplied by 2¹⁰, so that fp16 has no subnormal numbers in it."""
    gradient, labels = draw(30, 300), torch.arange(30, device=draw(1).device)
    scale = torch.full((), 2.0**10, device=gradient.device)
    given = {"objective": Objective(**options), "scale": scale, "need_grad": True}
    losses = linear_cross_entropy.cross_entropy_(gradient, labels, **given)
    return {"losses": losses, "gradient": gradient}


def step(draw: Draw, **options: bool) -> dict[str, Tensor]:
    """Three tensors, without masters; the state is in fp32 with any parameters."""
    params, grads = ([draw(n) for n in (5, 37, 2064)] for _ in range(2))
    first, second = ([draw(n).float().abs() for n in (5, 37, 2064)] for _ in range(2))
    one = torch.ones((), device=params[0].device)
    adam.step_(AdamLists(params, grads, first, second), AdamOptions(one, 0.3, (0.9, 0.99), 1e-8, 0.1, **options))
    return {f"{name} {i}": x for name, xs in (("p", params), ("m", first), ("v", second)) for i, x in enumerate(xs)}


def multiply(draw: Draw) -> dict[str, Tensor]:
    x, half = draw(70, 40), draw(70, 70).tril()
    added = half + half.tril(-1).mT
    return {"product": muon.symmetric_product(x), "sum": muon.symmetric_product(x, added, alpha=2.0, beta=-5.0)}


CASES: dict[str, Callable[[Draw], dict[str, Tensor]]] = {
    "rotary": turn,
    "layer_norm": normalise,
    "layer_norm, rms_norm": normalise_without_mean,
    "gated_activation, silu": lambda draw: gate(draw, "silu"),
    "gated_activation, gelu_tanh": lambda draw: gate(draw, "gelu_tanh"),
    "bias_gelu, tanh": lambda draw: activate(draw, "tanh"),
    "bias_gelu, erf": lambda draw: activate(draw, "none"),
    "adam": lambda draw: step(draw, decoupled=False),
    "adam, decoupled": lambda draw: step(draw, decoupled=True),
    "muon": multiply,
    "linear_cross_entropy": cross_entropy,
    "linear_cross_entropy, capped": lambda draw: cross_entropy(draw, softcap=5.0),
    "linear_cross_entropy, smoothed": lambda draw: cross_entropy(draw, label_smoothing=0.1, z_loss=1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_in_16_bits_is_triton_in_fp32_rounded(name: str, dtype: torch.dtype, device: str) -> None:
    """One in a hundred may differ by one step of the dtype: a GPU's compiler contracts other products and sums."""

    def drawing(storage: torch.dtype) -> Draw:
        generator = torch.Generator().manual_seed(0)
        return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype).to(storage)

    actual, whole = CASES[name](drawing(dtype)), CASES[name](drawing(torch.float32))
    for result, x in actual.items():
        expected = whole[result].to(x.dtype)
        step = torch.finfo(x.dtype).eps * expected.abs() + 2.0**-24
        assert ((x.float() - expected.float()).abs() <= step).all(), result
        assert (x != expected).float().mean() <= 0.01, result


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 0), (64, 32), (80, 32), (96, 0)])
def test_triton_attention_rounds_to_the_nearest(head_dim: int, rotary_dim: int, device: str) -> None:
    """Cut off towards zero, a result is half a step of its dtype too small in the mean, which error bounds allow."""
    case = Case(torch.bfloat16, device, sequence=100, head_dim=head_dim, rotary_dim=rotary_dim)
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    for tensor, x in run("triton", case, case).items():
        large = exact[tensor].abs() > exact[tensor].abs().median()  # the others are sums of terms with larger steps
        step = torch.exp2(exact[tensor].abs().log2().floor()) * torch.finfo(x.dtype).eps
        bias = ((x.double() - exact[tensor]) * exact[tensor].sign() / step)[large].mean()
        assert bias.abs() < 0.1, f"{tensor}: {bias:.3f} steps"

"""The ops under torch.autocast, and layer_norm with mixed dtypes or without bias, against float64 and beside torch's
own functions on the same tensors in the same context."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse, gradients
from torch import Tensor

from phi_fast.kernels import (
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    parallel_block,
    rms_norm,
    rotary_table,
    use,
)

BF16 = torch.bfloat16
LABELS = torch.arange(12) % 9


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.double() if logits.dtype == torch.float64 else logits.float(), LABELS)


def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, bias, LABELS)


def row_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, bias, LABELS, reduction="none").mean()


HEAD = {"hidden": draw(12, 16, dtype=BF16), "weight": draw(9, 16), "bias": draw(9)}
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]] = {
    "attention": (attention, plain_attention, {n: draw(1, 40, 2, 16).roll(i, 1) for i, n in enumerate("qkv")}),
    "linear_cross_entropy": (loss, plain_loss, HEAD),
    'linear_cross_entropy, "none"': (row_loss, plain_loss, HEAD),
    "layer_norm": (
        layer_norm,
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        {"x": draw(6, 32, dtype=BF16), "weight": draw(32), "bias": draw(32)},
    ),
    "bias_gelu": (
        bias_gelu,
        lambda x, bias: F.gelu(x + bias.to(x.dtype), approximate="tanh"),
        {"x": draw(6, 32, dtype=BF16), "bias": draw(32)},
    ),
    "rms_norm": (
        rms_norm,
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6),
        {"x": draw(6, 32, dtype=BF16), "weight": draw(32)},
    ),
    "gated_activation": (
        gated_activation,
        lambda gate, up: F.silu(gate) * up,
        {"gate": draw(6, 32, dtype=BF16), "up": draw(6, 32).roll(1)},
    ),
}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_under_autocast_as_torchs_own(name: str, dtype: torch.dtype, backend: str) -> None:
    """Forward and backward with fp32 parameters inside the context; gradients have each input's dtype."""
    ours, plain, inputs = CASES[name]
    exact_inputs = {n: x.double() for n, x in inputs.items()}
    dout = plain(**exact_inputs).sin() + 1
    with torch.autocast("cpu", dtype=dtype):
        expected = gradients(plain, inputs, dout)
        with use(backend):
            actual = gradients(ours, inputs, dout)
    exact = gradients(plain, exact_inputs, dout)
    for n, value in actual.items():
        assert n == "out" or value.dtype == inputs[n].dtype, n
        assert_no_worse(value, expected[n], exact[n], f"{name}: {n}")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("parameters", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_of_mixed_dtypes_and_without_bias(
    backend: str, parameters: torch.dtype, dtype: torch.dtype, has_bias: bool
) -> None:
    inputs = {"x": draw(6, 32, dtype=dtype), "weight": draw(32, dtype=parameters)}
    inputs |= {"bias": draw(32, dtype=parameters)} if has_bias else {}

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if {x.dtype, weight.dtype} == {torch.float32, BF16} and x.dtype == torch.float32:
            weight, bias = weight.float(), None if bias is None else bias.float()  # torch refuses this pair of dtypes
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer_norm(x, weight, bias)

    dout = draw(6, 32).double()
    with use(backend):
        actual = gradients(ours, inputs, dout)
    expected, exact = gradients(plain, inputs, dout), gradients(plain, {n: x.double() for n, x in inputs.items()}, dout)
    for n, value in actual.items():
        assert_no_worse(value, expected[n], exact[n], n)


def test_layer_norm_without_bias_compiles_and_adds_a_residual() -> None:
    x, residual, weight = draw(6, 32), draw(6, 32) + 1, draw(32)
    out, summed = torch.compile(layer_norm, backend="aot_eager", fullgraph=True)(x, weight, None, residual=residual)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(out, F.layer_norm(x + residual, (32,), weight, None))


@pytest.mark.parametrize("through_library", [False, True])
def test_parallel_block_casts_its_parameters(through_library: bool) -> None:
    """The parameters are cast once to the dtype of a bf16 x, with the result of bf16 parameters outside autocast."""
    d, m = 32, 48
    shapes = ((d,), (d,), (3 * d + m, d), (3 * d + m,), (d, d + m), (d,), (d,))
    x, table = draw(1, 5, d, dtype=BF16), rotary_table(5, 16)
    parameters = [(0.1 * draw(*shape)).requires_grad_() for shape in shapes]
    block = torch.compile(parallel_block, backend="aot_eager", fullgraph=True) if through_library else parallel_block
    with torch.autocast("cpu", dtype=BF16):
        out = block(x, *parameters, *table, num_heads=2)
        grads = torch.autograd.grad(out.float().sum(), parameters)
    lowered = [p.detach().to(BF16).requires_grad_() for p in parameters]
    expected = parallel_block(x, *lowered, *table, num_heads=2)
    assert torch.equal(out, expected)
    for actual, grad in zip(grads, torch.autograd.grad(expected.float().sum(), lowered), strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, grad.float())


@pytest.mark.parametrize("name", CASES)
def test_compiled_under_autocast_as_eager(name: str) -> None:
    ours, _, inputs = CASES[name]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=BF16):
        dout = torch.ones_like(ours(**inputs))
        eager, graph = gradients(ours, inputs, dout), gradients(compiled, inputs, dout)
    for n, value in eager.items():
        assert torch.equal(graph[n], value), n

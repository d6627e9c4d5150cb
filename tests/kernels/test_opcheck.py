"""The library ops that torch.compile sees: schema, fake tensors, autograd registration and AOT dispatch, by opcheck."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES
from torch.library import opcheck

from phi_fast.kernels import apply_rotary_, bias_gelu, layer_norm, rotary_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ops = torch.ops.phi_fast


def draw(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 2, 1], [5, 0, 3]])])
def test_rotary(interleaved, positions):
    cos, sin = rotary_table(8, 8, device=DEVICE)
    positions = None if positions is None else positions.to(DEVICE)
    opcheck(ops.rotary.default, (draw(2, 3, 4, 16), cos, sin, positions, 1, interleaved, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm(dtype, residual):
    vectors = draw(16, dtype=dtype), draw(16, dtype=dtype)
    opcheck(
        ops.layer_norm.default,
        (draw(2, 3, 16, dtype=dtype), *vectors, 1e-5, draw(2, 3, 16, dtype=dtype) if residual else None),
    )
    rows, statistics = (draw(6, 16, grad=False, dtype=dtype) for _ in range(2)), draw(6, grad=False)
    past = draw(6, 16, grad=False, dtype=dtype) if residual else None
    opcheck(ops.layer_norm_backward.default, (*rows, vectors[0].detach(), statistics, statistics.exp(), past))


@pytest.mark.parametrize("biased", [False, True])
def test_bias_gelu(biased):
    bias = draw(16) if biased else None
    opcheck(ops.bias_gelu.default, (draw(2, 3, 16), bias, "tanh"))
    detached = None if bias is None else bias.detach()
    opcheck(ops.bias_gelu_backward.default, (draw(2, 3, 16, grad=False), draw(2, 3, 16, grad=False), detached, "none"))


@pytest.mark.parametrize("recompute", ["none", "norm_gelu", "all"])
def test_parallel_block(recompute):
    d, mlp, x = 64, 32, draw(2, 3, 64)
    vectors = draw(d), draw(d)
    matrices = draw(3 * d + mlp, d), draw(3 * d + mlp), draw(d, d + mlp)
    cos, sin = rotary_table(4, 32, device=DEVICE)
    inputs = (x, *vectors, *matrices, draw(d), draw(d), cos, sin)
    opcheck(ops.parallel_block.default, (*inputs, None, 1, 1e-5, recompute, False))
    inputs = tuple(t.detach() for t in inputs)
    _, *saved = ops.parallel_block(*inputs, None, 1, 1e-5, recompute, False)
    kept = [*inputs[:6], *inputs[8:]]
    for wanted in ([True] * 8, [False, True, False, True, False, True, True, False]):
        opcheck(
            ops.parallel_block_backward.default,
            (draw(2, 3, 64, grad=False), saved, kept, None, 1, 1e-5, recompute, False, wanted),
        )


def test_compiled_ops_are_the_eager_ones():
    """Forward and gradients with fullgraph, and rotary in place on a slice of a buffer that needs its gradient."""
    cos, sin = rotary_table(8, 8, device=DEVICE)
    leaves = {"x": draw(2, 3, 4 * 16), "weight": draw(64), "bias": draw(64)}

    def model(x, weight, bias):
        h, summed = layer_norm(x, weight, bias, residual=2 * x)
        h = bias_gelu(h * 1, bias)
        apply_rotary_(h.view(2, 3, 4, 16)[:, :, :2], None, cos, sin, offset=2)
        return (h * summed).sum()

    expected = torch.autograd.grad(model(**leaves), list(leaves.values()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)

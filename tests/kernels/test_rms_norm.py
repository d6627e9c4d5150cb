"""rms_norm against float64, beside torch.nn.functional.rms_norm at the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, backends, double, gradients
from torch import Tensor

from phi_fast._C import cpu
from phi_fast.kernels import rms_norm, use
from phi_fast.kernels.reference.layer_norm import ResidualStream

BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")


def make(rows: int, d: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * d)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    wide = (1 + scale * draw(rows, 2 * d)).to(dtype)[:, :d]  # rows 2d apart, and a mean that must stay
    return {"x": wide, "weight": (1 + 0.3 * draw(d)).to(dtype)}


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def of_sum(norm):
    """The norm of x + residual beside that sum, so that both have a gradient."""

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        if norm is rms_norm:
            return torch.cat(rms_norm(x, weight, residual=residual), -1)
        return torch.cat((norm(x + residual, weight), x + residual), -1)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "scale"), [(5, 64, 1.0), (3, 37, 100.0), (18, 200, 1.0)])
def test_error_forward_and_gradients(backend, dtype, rows, d, scale, device):
    inputs = make(rows, d, dtype, device, scale)
    dout = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with use(backend, op="layer_norm"):
        actual = gradients(rms_norm, inputs, dout)
    expected, exact = gradients(plain, inputs, dout), gradients(plain, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("isa", cpu.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    """Widths around a vector's, with a residual sum and its gradient. With one column dx is 0 but for rounding."""
    cpu.force_isa(isa)
    try:
        for d in (2, 7, 16, 33, 200):
            made = make(9, d, dtype, "cpu")
            inputs = {"x": made["x"], "residual": made["x"].flip(0).contiguous(), "weight": made["weight"]}
            dout = torch.randn(9, 2 * d, generator=torch.Generator().manual_seed(1)).to(dtype)
            with use("cpp", op="layer_norm"):
                actual = gradients(of_sum(rms_norm), inputs, dout)
            expected, exact = gradients(of_sum(plain), inputs, dout), gradients(of_sum(plain), double(inputs), dout)
            for name in actual:
                assert_no_worse(actual[name], expected[name], exact[name], f"{name} of {d} with {isa}")
    finally:
        cpu.force_isa("")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [37, 17000], ids=["narrow", "wide"])
def test_residual_sum_and_its_gradients(backend, d, device):
    made = make(3, d, torch.float32, device)
    inputs = {"x": made["x"], "residual": made["x"].flip(0).contiguous(), "weight": made["weight"]}
    dout = torch.randn(3, 2 * d, generator=torch.Generator().manual_seed(1)).to(device)
    with use(backend, op="layer_norm"):
        actual = gradients(of_sum(rms_norm), inputs, dout)
    expected, exact = gradients(of_sum(plain), inputs, dout), gradients(of_sum(plain), double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("residual", [False, True])
def test_library_ops(residual):
    x = torch.randn(3, 8, requires_grad=True)
    weight, past = torch.randn(8, requires_grad=True), torch.randn(3, 8) if residual else None
    torch.library.opcheck(torch.ops.phi_fast.rms_norm.default, (x, weight, 1e-6, past))
    rows = (torch.randn(3, 8), x.detach(), weight.detach(), torch.rand(3), past)
    torch.library.opcheck(torch.ops.phi_fast.rms_norm_backward.default, rows)


def test_gradcheck():
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 7), (7,)))
    with use("reference", op="layer_norm"):
        assert torch.autograd.gradcheck(rms_norm, (x, weight))


def test_wrong_arguments_are_named():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\); expected \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        rms_norm(x.long(), None)


def test_cpp_takes_bias_and_mean_together():
    from phi_fast.kernels.cpp import layer_norm

    x, weight = torch.randn(3, 8), torch.ones(8)
    out, mean, rstd = layer_norm.forward(x, weight, None, 1e-6, ResidualStream())
    assert mean is None
    assert layer_norm.backward(x, x, weight, None, rstd)[2] is None
    torch.testing.assert_close(out, F.rms_norm(x, (8,), weight, 1e-6))

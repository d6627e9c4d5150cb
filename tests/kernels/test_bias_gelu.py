"""bias_gelu against float64, beside torch.nn.functional.gelu at the same dtype."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, assert_same_nonfinite, backends, double, gradients
from torch import Tensor

from phi_fast.kernels import bias_gelu, use

BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")
FORMS = ("tanh", "none")


def make(rows: int, n: int, dtype: torch.dtype, device: str, scale: float = 1.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * n)
    wide = (scale * torch.randn(rows, n + 5, generator=generator)).to(device, dtype)
    return {"x": wide[:, 2 : n + 2], "bias": torch.randn(n, generator=generator).to(device, dtype)}


def draw(rows: int, n: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "n", "scale"), [(5, 64, 1.5), (67, 150, 1.5), (4, 96, 300.0)])
def test_error_forward_and_gradients(backend, dtype, form, biased, rows, n, scale, device):
    """Covers strided rows, ragged widths, more rows than a program of the backward handles, and both tails."""
    inputs = make(rows, n, dtype, device, scale)
    if not biased:
        del inputs["bias"]

    def ours(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return bias_gelu(x, bias, approximate=form)

    def theirs(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=form)

    dout = draw(rows, n, dtype, device)
    with use(backend, op="bias_gelu"):
        actual = gradients(ours, inputs, dout)
    expected, exact = gradients(theirs, inputs, dout), gradients(theirs, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_in_place_of_the_gradient_and_beside_it(backend, dtype, device):
    """The parallel block's call: strided tensors, g written over dout, o copied along, and nothing else changes."""
    kernels = importlib.import_module(f"phi_fast.kernels.{backend}.bias_gelu")
    rows, d, n = 66, 8, 32
    packed, mixed, o = (
        draw(rows, 3 * d + n, dtype, device),
        draw(rows, d + n, dtype, device),
        draw(rows, d, dtype, device),
    )
    u = packed[:, 3 * d :]

    out = mixed.clone()
    kernels.forward(u, None, out=out[:, d:], carry=(o, out[:, :d]))
    plain = kernels.forward(u.contiguous(), None)
    assert torch.equal(out, torch.cat((o, plain), 1))

    dx, dbias = kernels.backward(mixed[:, d:].contiguous(), u.contiguous(), None)
    dmixed, dpacked = mixed.clone(), packed.clone()
    result, again = kernels.backward(
        dmixed[:, d:], u, None, dx=dpacked[:, 3 * d :], activation=dmixed[:, d:], carry=(o, dmixed[:, :d])
    )
    assert result.data_ptr() == dpacked[:, 3 * d :].data_ptr()
    assert torch.equal(dpacked, torch.cat((packed[:, : 3 * d], dx), 1))
    assert torch.equal(dbias, again)
    assert torch.equal(dmixed[:, :d], o)
    exact = F.gelu(u.double(), approximate="tanh")
    assert_no_worse(dmixed[:, d:], F.gelu(u, approximate="tanh"), exact, "g again")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_spread_as_in_torch(backend, dtype, form, device):
    """Compares with torch in float64. The reference is compared with torch in fp32, since it is torch, whose fp32
    erf-gelu of +inf is NaN with AVX-512 and inf without. torch's slope at an infinite input is NaN; its limit, 1 or 0,
    is accepted too."""
    x = torch.tensor([[torch.nan, 1.0, -60000.0, 60000.0, 0.0, torch.inf, -torch.inf]], device=device, dtype=dtype)
    with use(backend, op="bias_gelu"):
        actual = gradients(lambda x: bias_gelu(x, approximate=form), {"x": x}, torch.ones_like(x))
    exact = x.float() if backend == "reference" else x.double()
    expected = gradients(lambda x: F.gelu(x, approximate=form), {"x": exact}, torch.ones_like(exact))
    assert_same_nonfinite(actual["out"], expected["out"], "out")
    assert_same_nonfinite(actual["x"][:, :5], expected["x"][:, :5], "dx")
    at_infinity = actual["x"][:, 5:]
    limit = torch.tensor([[1.0, 0.0]], device=device, dtype=dtype)
    assert bool((at_infinity.isnan() | (at_infinity == limit)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend, device):
    inputs, dout = make(70, 40, torch.float32, device), draw(70, 40, torch.float32, device)
    with use(backend, op="bias_gelu"):
        first, second = (gradients(bias_gelu, inputs, dout) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_none(backend, device):
    x = draw(6, 16, torch.float32, device)
    with use(backend, op="bias_gelu"):
        flat = bias_gelu(x)
        assert torch.equal(bias_gelu(x.view(2, 3, 16)), flat.view(2, 3, 16))
        assert torch.equal(bias_gelu(x.T.contiguous().T), flat)
        assert bias_gelu(x[:0]).shape == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_by_stride(backend, device):
    x, bias = draw(6, 16, torch.float32, device), draw(1, 32, torch.float32, device)[0, ::2]
    with use(backend, op="bias_gelu"):
        actual, expected = (gradients(bias_gelu, {"x": x, "bias": b}, x) for b in (bias, bias.contiguous()))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


X, B = torch.zeros(2, 8), torch.ones(8)
BAD: list[tuple[tuple, dict, type[Exception], str]] = [
    ((X, B[:7]), {}, ValueError, r"bias has shape \(7,\); expected \(8,\)"),
    ((X.half(), B), {}, TypeError, "bias is torch.float32 and x is torch.float16"),
    ((X.int(),), {}, TypeError, "x is torch.int32"),
    ((X, B.to("meta")), {}, ValueError, "bias is on meta and x is on cpu"),
    ((X,), {"approximate": "erf"}, ValueError, "approximate='erf'; expected 'tanh' or 'none'"),
    ((torch.zeros(()),), {}, ValueError, "x is a scalar"),
    ((X[:, :0], B[:0]), {}, ValueError, r"x has shape \(2, 0\); expected \(..., n\) with n of at least 1"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(*arguments, **options)


def test_triton_names_what_it_cannot_do(device):
    with use("triton", op="bias_gelu"), pytest.raises(TypeError, match=r"float64; use\('reference', op='bias_gelu'\)"):
        bias_gelu(X.double().to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_writes_the_activation_again_with_the_same_bits(dtype: torch.dtype, device: str) -> None:
    """Both passes round to the nearest, where a store alone would cut bf16 off in the interpreter."""
    kernels = pytest.importorskip("phi_fast.kernels.triton.bias_gelu")
    x = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for approximate in ("tanh", "none"):
        activation = torch.empty_like(x)
        kernels.backward(torch.ones_like(x), x, None, activation=activation, approximate=approximate)
        assert torch.equal(activation, kernels.forward(x, None, approximate=approximate))

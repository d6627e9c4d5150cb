"""layer_norm against float64, beside torch.nn.functional.layer_norm at the same dtype."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, assert_same_nonfinite, backends, double, gradients
from torch import Tensor

from phi_fast.kernels import layer_norm, use
from phi_fast.kernels.reference.layer_norm import ResidualStream

BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")


def make(
    rows: int, d: int, dtype: torch.dtype, device: str, scale: float = 1.0, mean: float = 0.0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * d)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    wide = (mean + scale * draw(rows, 2 * d)).to(dtype)[:, :d]  # rows 2d apart
    return {"x": wide, "weight": (1 + 0.3 * draw(d)).to(dtype), "bias": draw(d).to(dtype)}


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d", "scale", "mean"),
    [(5, 64, 1.0, 0.0), (3, 37, 100.0, 0.0), (1, 1000, 1.0, 0.0), (4, 200, 1.0, 50.0)],
)
def test_error_forward_and_gradients(backend, dtype, rows, d, scale, mean, device):
    """Covers strided rows, ragged widths, large magnitudes, and a mean much larger than the deviation."""
    inputs = make(rows, d, dtype, device, scale, mean)
    dout = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with use(backend, op="layer_norm"):
        actual = gradients(layer_norm, inputs, dout)
    expected, exact = gradients(plain, inputs, dout), gradients(plain, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("d", [200, 900, 1100])
@pytest.mark.parametrize("rows", [12, 13, 16])
def test_triton_programs_share_out_the_rows(rows, d, device, monkeypatch):
    """With more tiles than programs, evenly divided or not, every row is summed once: tiles of several rows, of one
    row, and of a third of one. The tiles are smaller than the usual ones."""
    kernels = importlib.import_module("phi_fast.kernels.triton.layer_norm")
    forget = importlib.import_module("phi_fast.kernels.triton.launching").forget
    for name, value in (("TILE", 512), ("WIDE", 1024), ("multiprocessors", lambda device: 3)):
        monkeypatch.setattr(kernels, name, value)
    forget()  # the launches that are kept for these shapes have the usual tiles
    inputs = make(rows, d, torch.float32, device)
    dout = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(device)
    with use("triton", op="layer_norm"):
        actual = gradients(layer_norm, inputs, dout)
    expected, exact = gradients(plain, inputs, dout), gradients(plain, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)
    forget()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_triton_reads_wide_rows_in_parts(dtype, with_residual, device) -> None:
    """The forward of rows that registers do not hold: against float64, and the sum that it writes over the residual."""
    d = 16385 + 100 * with_residual
    kernels = importlib.import_module("phi_fast.kernels.triton.layer_norm")
    x, weight, bias = make(2, d, dtype, device, scale=3.0, mean=5.0).values()
    residual = make(3, d, dtype, device)["x"][1:].contiguous() if with_residual else None
    normalised = x + residual if with_residual else x
    shifted = torch.empty_like(x)
    stream = ResidualStream(residual, residual, bias, shifted)
    out, mean, rstd = kernels.forward(x, weight, bias, 1e-5, stream)
    exact = plain(normalised.double(), weight.double(), bias.double())
    assert_no_worse(out, plain(normalised, weight, bias), exact, "out")
    assert torch.equal(shifted, normalised + bias)
    if with_residual:
        assert torch.equal(residual, normalised)
    torch.testing.assert_close(mean.double(), normalised.double().mean(1), atol=1e-5, rtol=1e-5)
    variance = normalised.double().var(1, correction=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "rows", "d", "dtype", "programs", "stages"),
    [  # two programs of 8 warps on each multiprocessor, or one of 16; tiles of 2048 elements, or of a whole row
        ("sm_90", 8192, 2048, torch.float16, 264, 3),
        ("sm_80", 8192, 768, torch.float32, 216, 3),
        ("sm_100", 8192, 8192, torch.float16, 148, 3),
        ("sm_90", 8192, 8192, torch.float32, 132, 2),  # three rows of 32 KB: one more of each fits in 96 KB
        ("sm_90", 8192, 32768, torch.float16, 16 * 16, 3),  # 264 over the 16 parts of a row
        ("sm_90", 100, 2048, torch.float16, 100, 3),
        ("sm_90", 100, 64, torch.float16, 4, 3),  # 32 rows in a tile
    ],
)
def test_the_backward_is_as_many_programs_as_a_gpu_holds(architecture, rows, d, dtype, programs, stages) -> None:
    kernels, common = (importlib.import_module(f"phi_fast.kernels.triton.{name}") for name in ("layer_norm", "common"))
    x, statistic = torch.empty(rows, d, dtype=dtype, device="meta"), torch.empty(rows, device="meta")
    with common.recording(architecture) as launches:
        kernels.backward(x, x, x[0], statistic, statistic, residual_grad=x)
    launch = launches[-1]
    assert launch.grid == (programs,) and launch.constants["STAGES"] == stages
    assert launch.arguments["partial"].shape == (2, programs // (16 if d == 32768 else 1), d)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_sum_and_both_gradients(backend, dtype, device):
    inputs = make(6, 400, dtype, device) | {"residual": make(7, 400, dtype, device)["x"][1:]}
    dout, dsummed = (make(6 + i, 400, dtype, device)["x"][i:] for i in (2, 3))

    def both(function):
        # The two outputs are concatenated, so that one gradient reaches both.
        return lambda **tensors: torch.cat(function(**tensors), -1)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return layer_norm(x, weight, bias, residual=residual)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x + residual, weight, bias), x + residual

    upstream = torch.cat((dout, dsummed), -1)
    with use(backend, op="layer_norm"):
        actual = gradients(both(ours), inputs, upstream)
    expected, exact = gradients(both(theirs), inputs, upstream), gradients(both(theirs), double(inputs), upstream)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)
    assert torch.equal(actual["out"][:, 400:], inputs["x"] + inputs["residual"])
    assert torch.equal(actual["x"], actual["residual"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shifted_stream_beside_the_norm(backend, dtype, device):
    """x + shift is written in the same pass, to rows of another stride, and does not change the norm."""
    kernels = importlib.import_module(f"phi_fast.kernels.{backend}.layer_norm")
    x, weight, bias = make(5, 48, dtype, device).values()
    shifted = x.new_zeros(5, 64)
    out, mean, rstd = kernels.forward(x, weight, bias, 1e-5, ResidualStream(shift=bias, shifted=shifted[:, :48]))
    assert torch.equal(shifted[:, :48], x + bias)
    assert not shifted[:, 48:].any()
    for a, b in zip((out, mean, rstd), kernels.forward(x, weight, bias, 1e-5), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(mean, x.float().mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_past_the_norm_is_added_in_place(backend, dtype, device):
    """dx is written over dy, as in the parallel block, with the residual's gradient added before rounding."""
    kernels = importlib.import_module(f"phi_fast.kernels.{backend}.layer_norm")
    x, weight, bias = make(5, 48, dtype, device).values()
    dy, past = (make(5 + i, 48, dtype, device)["x"][i:] for i in (1, 2))
    _, mean, rstd = kernels.forward(x, weight, bias, 1e-5)
    apart, *sums = kernels.backward(dy, x, weight, mean, rstd, residual_grad=past)
    buffer = dy.clone()
    within, *again = kernels.backward(buffer, x, weight, mean, rstd, residual_grad=past, dx=buffer)
    assert within.data_ptr() == buffer.data_ptr()
    for a, b in zip((apart, *sums), (within, *again), strict=True):
        assert torch.equal(a, b)
    inputs = {"x": x, "weight": weight, "bias": bias}
    exact = gradients(plain, double(inputs), dy)["x"] + past.double()
    assert_no_worse(apart, gradients(plain, inputs, dy)["x"] + past, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(backend, dtype, device):
    inputs = make(4, 16, dtype, device)
    inputs["x"][1, 3], inputs["x"][2, 0] = torch.nan, torch.inf
    dout = torch.ones(4, 16, device=device, dtype=dtype)
    with use(backend, op="layer_norm"):
        actual = gradients(layer_norm, inputs, dout)
    expected = gradients(plain, inputs, dout)
    for name in actual:
        assert_same_nonfinite(actual[name], expected[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend, device):
    inputs = make(9, 96, torch.float32, device)
    dout = torch.randn(9, 96, generator=torch.Generator().manual_seed(1)).to(device)
    with use(backend, op="layer_norm"):
        first, second = (gradients(layer_norm, inputs, dout) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_none(backend, device):
    x, weight, bias = make(6, 16, torch.float32, device).values()
    with use(backend, op="layer_norm"):
        cube = layer_norm(x.reshape(2, 3, 16), weight, bias)
        assert torch.equal(cube, layer_norm(x, weight, bias).view(2, 3, 16))
        assert torch.equal(layer_norm(x[0], weight, bias), cube[0, 0])
        turned = x.T.contiguous().T  # its last stride is not 1, so it is copied
        assert torch.equal(layer_norm(turned, weight, bias), cube.view(6, 16))
        assert layer_norm(x[:0], weight, bias).shape == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_and_bias_by_stride(backend, dtype, device):
    x, strided = make(3, 48, dtype, device)["x"], make(1, 96, dtype, device)["bias"][::2]
    with use(backend, op="layer_norm"):
        actual, expected = (
            gradients(layer_norm, {"x": x, "weight": v, "bias": v}, x) for v in (strided, strided.contiguous())
        )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    kernels, shifted = importlib.import_module(f"phi_fast.kernels.{backend}.layer_norm"), torch.empty_like(x)
    kernels.forward(x, strided, strided, 1e-5, ResidualStream(shift=strided, shifted=shifted))
    assert torch.equal(shifted, x + strided)


X, W = torch.zeros(2, 8), torch.ones(8)
BAD: list[tuple[tuple, dict, type[Exception], str]] = [
    ((X, W[:7], W), {}, ValueError, r"weight has shape \(7,\); expected \(8,\)"),
    ((X, W, W[:, None]), {}, ValueError, r"bias has shape \(8, 1\)"),
    ((X, W.int(), W), {}, TypeError, "weight is torch.int32; expected float16"),
    ((X, W, W), {"residual": X.int()}, TypeError, "residual is torch.int32; expected float16"),
    ((X.int(), W, W), {}, TypeError, "x is torch.int32"),
    ((X, W.to("meta"), W), {}, ValueError, "weight is on meta and x is on cpu"),
    ((X, W, W), {"residual": X[:1]}, ValueError, r"residual has shape \(1, 8\) and x \(2, 8\)"),
    ((torch.zeros(()), W, W), {}, ValueError, "x is a scalar"),
    ((X[:, :0], W[:0], W[:0]), {}, ValueError, r"x has shape \(2, 0\); expected \(..., d\) with d of at least 1"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        layer_norm(*arguments, **options)


def test_triton_names_what_it_cannot_do(device):
    with use("triton", op="layer_norm"):
        with pytest.raises(TypeError, match=r"float64; use\('reference', op='layer_norm'\)"):
            layer_norm(X.double().to(device), W.double().to(device), W.double().to(device))
        wide = torch.zeros(1, 32769, device=device)
        with pytest.raises(ValueError, match="up to 32768 elements, not 32769"):
            layer_norm(wide, wide[0], wide[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_tensors_of_several_dtypes(backend, device, x_dtype, residual_dtype, weight_dtype) -> None:
    """The sum has torch's dtype of x + residual, the result has x's, and no error exceeds torch's."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (37, 96), "residual": (37, 96), "weight": (96,), "bias": (96,)}
    dtypes = {"x": x_dtype, "residual": residual_dtype, "weight": weight_dtype, "bias": weight_dtype}
    drawn = {name: torch.randn(shape, generator=generator).to(device, dtypes[name]) for name, shape in shapes.items()}
    grads = [torch.randn(37, 96, generator=generator).to(device) for _ in range(2)]
    carried = torch.promote_types(x_dtype, residual_dtype)

    def run(function, wide=None):
        leaves = {name: tensor.to(wide or tensor.dtype, copy=True).requires_grad_() for name, tensor in drawn.items()}
        out, summed = function(**leaves)
        (out * grads[0].to(out.dtype)).sum().add((summed * grads[1].to(summed.dtype)).sum()).backward()
        return {"out": out.detach(), "summed": summed.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    def theirs(x, residual, weight, bias):
        summed = x + residual
        wide = torch.promote_types(summed.dtype, weight.dtype)
        out = torch.nn.functional.layer_norm(summed.to(wide), (96,), weight.to(wide), bias.to(wide))
        return out.to(x.dtype), summed

    with use(backend):
        ours = run(lambda x, residual, weight, bias: layer_norm(x, weight, bias, residual=residual))
    usual, exact = run(theirs), run(theirs, torch.float64)
    assert ours["out"].dtype == x_dtype and ours["summed"].dtype == carried
    for name, tensor in ours.items():
        assert tensor.dtype == usual[name].dtype, name
        assert_no_worse(tensor, usual[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_and_bias_may_be_none(backend, device) -> None:
    x = make(6, 64, torch.float32, device)["x"].detach().requires_grad_()
    with use(backend):
        out = layer_norm(x, None, None)
        out.square().sum().backward()
    y = x.detach().requires_grad_()
    torch.nn.functional.layer_norm(y, (y.shape[-1],)).square().sum().backward()
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (x.shape[-1],)))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)

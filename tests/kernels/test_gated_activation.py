"""gated_activation against float64, beside torch's silu or gelu and product at the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, assert_same_nonfinite, backends, double, gradients
from torch import Tensor

from phi_fast._C import cpu
from phi_fast.kernels import gated_activation, use
from phi_fast.kernels.cpp import gated_activation as cpp

BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
OP = torch.ops.phi_fast.gated_activation


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def apart(rows: int, n: int, dtype: torch.dtype, device: str, scale: float) -> dict[str, Tensor]:
    """Rows with gaps between them, of two widths."""
    gate, up = draw(rows, n + 5), draw(rows, n + 3, seed=1)
    return {"gate": (scale * gate).to(device, dtype)[:, 2 : n + 2], "up": up.to(device, dtype)[:, :n]}


def packed(rows: int, n: int, dtype: torch.dtype, device: str, scale: float) -> dict[str, Tensor]:
    return {"gate": torch.cat((scale * draw(rows, n), draw(rows, n, seed=1)), 1).to(device, dtype)}


def theirs(activation: str) -> Callable[..., Tensor]:
    def run(gate: Tensor, up: Tensor | None = None) -> Tensor:
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return PLAIN[activation](gate) * up

    return run


def ours(activation: str) -> Callable[..., Tensor]:
    return lambda gate, up=None: gated_activation(gate, up, activation=activation)


def judge(activation: str, inputs: dict[str, Tensor], dout: Tensor) -> None:
    actual = gradients(ours(activation), inputs, dout)
    expected = gradients(theirs(activation), inputs, dout)
    exact = gradients(theirs(activation), double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("make", [apart, packed])
@pytest.mark.parametrize(("rows", "n", "scale"), [(150, 64, 1.5), (13, 550, 1.5), (90, 97, 100.0)])
def test_error_forward_and_gradients(backend, dtype, activation, make, rows, n, scale, device):
    """Covers strided rows, halves of one projection, ragged widths, more than a tile each way, and both tails."""
    with use(backend, op="gated_activation"):
        judge(activation, make(rows, n, dtype, device, scale), draw(rows, n, seed=2).to(device, dtype))


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa("")


@pytest.mark.parametrize("isa", cpu.supported_isas(), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PLAIN)
def test_every_instruction_set(isa: str, dtype: torch.dtype, activation: str) -> None:
    """The errors of several widths are judged together: the largest of few entries is chance."""
    found: dict[str, list[list[Tensor]]] = {}
    for n in (1, 7, 16, 33, 150):
        inputs, dout = apart(40, n, dtype, "cpu", 3.0), draw(40, n, seed=2).to(dtype)
        with use("cpp"):
            actual = gradients(ours(activation), inputs, dout)
        expected = gradients(theirs(activation), inputs, dout)
        exact = gradients(theirs(activation), double(inputs), dout)
        for name in actual:
            found.setdefault(name, []).append([x[name].flatten() for x in (actual, expected, exact)])
    for name, parts in found.items():
        assert_no_worse(*(torch.cat(x) for x in zip(*parts, strict=True)), name)


@pytest.mark.parametrize("isa", cpu.supported_isas(), indirect=True)
def test_silu_is_right_in_its_tails(isa: str) -> None:
    """From 1e-30 to 1e30 the value is finite; near 0, where it is x / 2, it is relatively accurate."""
    x = torch.logspace(-30, 30, 4001, dtype=torch.float64)
    x = torch.cat((x, -x)).float().reshape(2, -1)
    one = torch.ones_like(x)
    out, slope = cpp.forward(x, one), cpp.backward(one, x, one)[0]
    wide = x.double().requires_grad_()
    exact = F.silu(wide)
    [exact_slope] = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-32)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-6, atol=1e-7)
    small = x.abs() < 1e-3
    torch.testing.assert_close(out.double()[small], exact[small], rtol=5e-7, atol=1e-37)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PLAIN)
def test_nan_and_inf_spread_as_in_torch(backend, dtype, activation, device):
    """torch's slope at an infinite input is NaN; its limit, 1 or 0, is accepted too."""
    gate = torch.tensor([[torch.nan, 1.0, -60000.0, 60000.0, 0.0, torch.inf, -torch.inf]], device=device, dtype=dtype)
    inputs = {"gate": gate, "up": torch.ones_like(gate)}
    with use(backend, op="gated_activation"):
        actual = gradients(ours(activation), inputs, torch.ones_like(gate))
    exact = {name: x.double() for name, x in inputs.items()}
    expected = gradients(theirs(activation), exact, torch.ones_like(gate))
    for name in ("out", "up"):
        assert_same_nonfinite(actual[name], expected[name], name)
    assert_same_nonfinite(actual["gate"][:, :5], expected["gate"][:, :5], "dgate")
    at_infinity = actual["gate"][:, 5:]
    limit = torch.tensor([[1.0, 0.0]], device=device, dtype=dtype)
    assert bool((at_infinity.isnan() | (at_infinity == limit)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_none(backend, device):
    gate, up = draw(6, 16).to(device), draw(6, 16, seed=1).to(device)
    with use(backend, op="gated_activation"):
        flat = gated_activation(gate, up)
        assert torch.equal(gated_activation(gate.view(2, 3, 16), up.view(2, 3, 16)), flat.view(2, 3, 16))
        assert torch.equal(gated_activation(gate.T.contiguous().T, up), flat)
        halves = gated_activation(torch.cat((gate, up), 1))
        torch.testing.assert_close(halves, flat, rtol=1e-6, atol=0.0)  # torch itself differs by stride in the last bit
        assert gated_activation(gate[:0], up[:0]).shape == (0, 16)
        empty = gate[:0].requires_grad_()
        gated_activation(empty).sum().backward()
        assert empty.grad is not None and empty.grad.shape == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_beside_others_are_left_alone(backend, device):
    """The kernels' contract: rows at any stride for every operand, and nothing written between them."""
    import importlib

    kernels = importlib.import_module(f"phi_fast.kernels.{backend}.gated_activation")
    gate, up, dout = (draw(7, 40, seed=i).to(device) for i in range(3))
    expected = [kernels.forward(gate, up), *kernels.backward(dout, gate, up)]
    room = torch.full((7, 150), 5.0, device=device)
    out, dgate, dup = room[:, 2:42], room[:, 50:90], room[:, 90:130]
    kernels.forward(gate, up, out=out)
    kernels.backward(dout, gate, up, dgate=dgate, dup=dup)
    for actual, right in zip((out, dgate, dup), expected, strict=True):
        assert torch.equal(actual, right)
    assert bool((room[:, [0, 1, *range(42, 50), *range(130, 150)]] == 5.0).all())


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("halves", [False, True])
def test_library_ops(activation, halves):
    gate, up = draw(2, 3, 16).requires_grad_(), None if halves else draw(2, 3, 16, seed=1).requires_grad_()
    torch.library.opcheck(OP.default, (gate, up, activation))
    detached = None if up is None else up.detach()
    arguments = (draw(2, 3, 8 if halves else 16), gate.detach(), detached, activation)
    torch.library.opcheck(torch.ops.phi_fast.gated_activation_backward.default, arguments)


@pytest.mark.parametrize("activation", PLAIN)
def test_gradcheck(activation):
    gate, up = (draw(5, 6, seed=i).double().requires_grad_() for i in range(2))
    with use("reference"):
        assert torch.autograd.gradcheck(ours(activation), (gate, up))
        assert torch.autograd.gradcheck(ours(activation), (gate,))


@pytest.mark.parametrize("halves", [False, True])
def test_compiled_is_the_eager_one(halves):
    inputs = {"gate": draw(3, 16)} | ({} if halves else {"up": draw(3, 16, seed=1)})
    compiled = torch.compile(ours("silu"), fullgraph=True, backend="aot_eager")
    dout = draw(3, 8 if halves else 16, seed=2)
    eager, graph = (gradients(op, inputs, dout) for op in (ours("silu"), compiled))
    for name, value in eager.items():
        assert torch.equal(graph[name], value), name


X = torch.zeros(2, 8)
BAD: list[tuple[tuple, dict, type[Exception], str]] = [
    ((X, X[:, :7]), {}, ValueError, r"up has shape \(2, 7\); expected \(2, 8\)"),
    ((X, X.half()), {}, TypeError, "up is torch.float16 and gate is torch.float32"),
    ((X.int(), X), {}, TypeError, "gate is torch.int32"),
    ((X, X.to("meta")), {}, ValueError, "up is on meta and gate is on cpu"),
    ((X, X), {"activation": "relu"}, ValueError, "activation='relu'; expected 'silu' or 'gelu_tanh'"),
    ((torch.zeros(()),), {}, ValueError, r"gate has shape \(\); expected \(..., n\) with n of at least 1"),
    ((X[:, :0],), {}, ValueError, r"gate has shape \(2, 0\); expected \(..., n\) with n of at least 1"),
    ((X[:, :7],), {}, ValueError, r"gate has shape \(2, 7\); without up it holds both, \(..., 2n\)"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gated_activation(*arguments, **options)


def test_triton_names_what_it_cannot_do(device):
    with use("triton"), pytest.raises(TypeError, match=r"float64; use\('reference', op='gated_activation'\)"):
        gated_activation(X.double().to(device))

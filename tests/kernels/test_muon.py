"""Muon beside torch's, beside the singular value decomposition in float64, and what a skipped step leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numerics import assert_no_worse
from torch import Tensor

from phi_fast.kernels import backend, use
from phi_fast.kernels.muon import COEFFICIENTS, momentum_, muon_step_, orthogonalize, update_, update_scale

SHAPES = [(48, 48), (96, 32), (32, 96), (1, 7)]


@pytest.fixture(params=["reference", "auto"], autouse=True)
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plain PyTorch, and what the device has: on a CPU momentum and update are C++'s."""
    with use(request.param, op="muon"):
        yield request.param


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_svd(m: Tensor) -> Tensor:
    """The iteration in float64 as it is defined: the published odd quintic applied to each singular value, 5 times."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def plain(m: Tensor) -> Tensor:
    """Keller Jordan's published loop in m's dtype; of an array of numpy in its own."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (x * x).sum() ** 0.5
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if m.shape[0] > m.shape[1] else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_polynomial_acts_on_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m = (matrix(shape) * 1e-3).to(dtype)  # the size of the matrix makes no difference
    assert_no_worse(orthogonalize(m, dtype=dtype), plain(m), by_svd(m))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs a long double of more than 64 bits")
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_has_plain_torchs_error_against_long_doubles(shape: tuple[int, int]) -> None:
    m = matrix(shape).double()
    exact = plain(m.numpy().astype(np.longdouble))
    ours, theirs = (np.abs(found.numpy() - exact).max() for found in (orthogonalize(m, dtype=torch.float64), plain(m)))
    assert ours <= 2 * max(theirs, np.finfo(np.float64).eps)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, int]) -> None:
    u, s, vh = torch.linalg.svd(matrix(shape).double(), full_matrices=False)
    spread = torch.linspace(1, 0.05, len(s), dtype=torch.float64)
    singular = torch.diagonal(u.mT @ orthogonalize(u @ torch.diag(spread) @ vh).double() @ vh.mT)
    assert 0.6 < singular.min() <= singular.max() < 1.3


def test_zeros_stay_zero() -> None:
    assert not orthogonalize(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_trajectory_is_torch_muons(shape: tuple[int, int], nesterov: bool) -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("torch.optim.Muon is in torch >= 2.9")
    theirs = torch.nn.Parameter(matrix(shape))
    ours, momentum = theirs.detach().clone(), torch.zeros(shape)
    exact, buffer = matrix(shape).double(), torch.zeros(shape, dtype=torch.float64)
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    optimizer = muon([theirs], momentum=0.9, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(4):
        grad = matrix(shape, seed=step + 1)
        theirs.grad = grad.clone()
        optimizer.step()
        muon_step_([ours], [grad], [momentum], beta=0.9, **options)
        buffer = 0.9 * buffer + 0.1 * grad.double()
        direction = 0.1 * grad.double() + 0.9 * buffer if nesterov else buffer
        exact = exact * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(shape) ** 0.5 * by_svd(direction)
    assert_no_worse(momentum, optimizer.state[theirs]["momentum_buffer"], buffer, "momentum")
    assert_no_worse(ours, theirs.detach(), exact, "weights")


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("direction_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_momentum_has_plain_torchs_error(grad_dtype, direction_dtype, nesterov: bool, transposed: bool) -> None:
    grad, momentum = matrix((7, 41)).to(grad_dtype), matrix((7, 41), seed=1)
    direction = (
        torch.empty(41, 7, dtype=direction_dtype).mT if transposed else torch.empty(7, 41, dtype=direction_dtype)
    )
    scale = torch.tensor(0.3)
    wide = []
    for dtype in (torch.float64, torch.float32):
        g, m = grad.to(dtype) * scale.to(dtype), momentum.to(dtype)
        m = 0.9 * m + (1 - 0.9) * g
        wide.append(((1 - 0.9) * g + 0.9 * m if nesterov else m, m))
    momentum_(grad, momentum, direction, beta=0.9, nesterov=nesterov, grad_scale=scale)
    for ours, exact, theirs in zip((direction, momentum), *wide, strict=True):
        assert_no_worse(ours, theirs.to(ours.dtype), exact)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_master", [False, True])
@pytest.mark.parametrize("update_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_update_has_plain_torchs_error(dtype, update_dtype, with_master: bool, transposed: bool) -> None:
    param, update = matrix((7, 41)).to(dtype), matrix((7, 41), seed=1).to(update_dtype)
    if transposed:
        param = param.mT.contiguous().mT
    master, momentum = matrix((7, 41)) if with_master else None, torch.zeros(7, 41)
    old = param.clone() if master is None else master.clone()
    exact, theirs = (old.to(x) * (1 - 0.02 * 0.1) - update.to(x) * (0.02 * 3.0) for x in (torch.float64, torch.float32))
    update_(param, update, momentum, master, lr=torch.tensor(0.02), scale=3.0, weight_decay=0.1)
    assert_no_worse(param, theirs.to(dtype), exact)
    if master is not None:
        assert_no_worse(master, theirs, exact)
        assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("place", [0, 16, 40])
@pytest.mark.parametrize("what", ["param", "momentum"])
def test_what_is_not_finite_after_an_update_is_reported(what: str, place: int) -> None:
    tensors, flag = {"param": torch.ones(41).half(), "momentum": torch.ones(41)}, torch.zeros(())
    given = {"update": torch.zeros(41), "lr": 1.0, "scale": 1.0, "nonfinite": flag}
    update_(**tensors, **given)
    assert flag == 0
    tensors[what][place] = torch.inf
    update_(**tensors, **given)
    assert flag == 1
    given["update"][place], tensors["param"][place], flag[()] = -7e4, 0.0, 0.0  # finite in fp32, not in fp16
    update_(**tensors, **given)
    assert flag == 1


def test_fp64_needs_the_reference(back_end: str) -> None:
    kernels = backend.implementation("muon", torch.device("cpu"))
    assert kernels.__name__.endswith("reference.muon" if back_end == "reference" else "cpp.muon")
    params, grads, momenta = ([torch.ones(4, 4, dtype=torch.float64)] for _ in range(3))
    if back_end == "reference":
        muon_step_(params, grads, momenta, lr=0.1, dtype=torch.float64)
    else:
        with pytest.raises(TypeError, match=r"not torch.float64; use\('reference', op='muon'\)"):
            muon_step_(params, grads, momenta, lr=0.1)


def test_scale_is_moonlights() -> None:
    assert update_scale(100, 25) == update_scale(25, 100) == pytest.approx(2.0)
    assert COEFFICIENTS == (3.4445, -4.7750, 2.0315)


def test_masters_are_stepped_and_gradients_unscaled() -> None:
    start, grad = matrix((16, 8)), matrix((16, 8), seed=1)
    plain, momentum = start.clone(), torch.zeros(16, 8)
    muon_step_([plain], [grad], [momentum], lr=0.01)
    half, master, other = start.half(), start.clone(), torch.zeros(16, 8)
    muon_step_([half], [grad * 64], [other], [master], lr=0.01, grad_scale=torch.tensor(1 / 64))
    assert torch.equal(master, plain)
    assert torch.equal(other, momentum)
    assert torch.equal(half, plain.half())


def test_an_overflow_changes_nothing() -> None:
    param, momentum, flag = matrix((8, 8)), matrix((8, 8), seed=2), torch.zeros(())
    before = param.clone(), momentum.clone()
    grad = torch.full((8, 8), float("inf"))
    muon_step_([param], [grad], [momentum], lr=0.1, found_inf=torch.ones(()), nonfinite=flag)
    assert torch.equal(param, before[0])
    assert torch.equal(momentum, before[1])
    assert flag == 0
    muon_step_([param], [grad], [momentum], lr=0.1, found_inf=torch.zeros(()), nonfinite=flag)
    assert flag == 1


def test_a_graph_of_the_old_weights_raises() -> None:
    param = torch.nn.Parameter(matrix((4, 4)))
    loss = param.square().sum()
    muon_step_([param], [matrix((4, 4))], [torch.zeros(4, 4)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthogonalize(torch.zeros(3)), r"matrix is \(3,\): expected \(rows, columns\)"),
        (lambda: orthogonalize(torch.zeros(0, 3)), r"neither of them 0"),
        (lambda: orthogonalize(torch.zeros(3, 3), dtype=torch.float16), "dtype is torch.float16: expected one of"),
        (lambda: orthogonalize(torch.zeros(3, 3), steps=-1), "steps=-1: expected 0 or more"),
        (lambda: muon_step_([torch.zeros(3, 3)], [], [], lr=1.0), "grads has 0 tensors and params 1"),
        (
            lambda: momentum_(torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 3)),
            r"grad is \(3,\) on cpu, not the 9 elements of momentum",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("params", "grads", "masters", "message"),
    [
        ([(4, 6), (6,)], [(4, 6), (6,)], None, r"params\[1\] is \(6,\): expected \(rows, columns\)"),
        ([(4, 6), (6, 4)], [(4, 6), (4, 6)], None, r"grads\[1\] is \(4, 6\) and params\[1\] \(6, 4\)"),
        ([(4, 6), (6, 4)], [(4, 6), (6, 4)], [(4, 6), (4, 6)], r"masters\[1\] is \(4, 6\) and params\[1\] \(6, 4\)"),
    ],
)
def test_lists_that_do_not_fit_are_refused_before_anything_changes(params, grads, masters, message) -> None:
    weights, momenta = [torch.ones(shape) for shape in params], [torch.zeros(shape) for shape in params]
    others = None if masters is None else [torch.ones(shape) for shape in masters]
    with pytest.raises(ValueError, match=message):
        muon_step_(weights, [torch.ones(shape) for shape in grads], momenta, others, lr=0.1)
    assert all(bool((w == 1).all()) for w in weights) and not any(bool(m.any()) for m in momenta)

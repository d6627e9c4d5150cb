"""Muon beside torch's, beside the singular value decomposition in float64, and what a skipped step leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi_fast.kernels.muon import COEFFICIENTS, momentum_, muon_step_, orthogonalize, update_scale

SHAPES = [(48, 48), (96, 32), (32, 96), (1, 7)]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_svd(m: Tensor) -> Tensor:
    """The iteration in float64 as it is defined: the published odd quintic applied to each singular value, 5 times."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_the_polynomial_acts_on_singular_values(shape: tuple[int, int], dtype: torch.dtype, close: float) -> None:
    m = matrix(shape) * 1e-3  # the size of the matrix makes no difference
    got = orthogonalize(m, dtype=dtype)
    assert got.dtype == dtype
    expected = by_svd(m)
    assert torch.linalg.vector_norm(got.double() - expected) <= close * torch.linalg.vector_norm(expected)


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
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    optimizer = muon([theirs], momentum=0.9, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(4):
        grad = matrix(shape, seed=step + 1)
        theirs.grad = grad.clone()
        optimizer.step()
        muon_step_([ours], [grad], [momentum], beta=0.9, **options)
    torch.testing.assert_close(momentum, optimizer.state[theirs]["momentum_buffer"])
    moved = torch.linalg.vector_norm(theirs.detach() - matrix(shape))
    # torch rounds the norm that it divides by to bf16, so updates agree within the rounding of bf16.
    assert torch.linalg.vector_norm(ours - theirs.detach()) < 0.02 * moved


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

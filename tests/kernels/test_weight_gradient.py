"""The gradient of a weight, by torch's product, and in C++ by tiles if the processor has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from numerics import DTYPES, assert_no_worse
from torch import Tensor

from phi_fast._C import cpu
from phi_fast.kernels import linear_cross_entropy
from phi_fast.kernels.cpp import weight_gradient
from phi_fast.kernels.reference import weight_gradient as reference

# Rows, columns of a, columns of b: one, ragged tiles, whole tiles, and for each more than is processed at a time.
SHAPES = [(1, 1, 1), (37, 70, 45), (33, 16, 17), (64, 32, 96), (1100, 200, 40), (40, 300, 530), (0, 3, 5)]


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa("")


def operands(rows: int, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slices of wider buffers that start at odd elements, as in the packed block; a read beside them changes a sum."""
    generator = torch.Generator().manual_seed(rows + m + n)
    buffers = [torch.full((rows, columns + 8), torch.nan, dtype=dtype) for columns in (m, n)]
    a, b = (buffer[:, 3:-5] for buffer in buffers)
    for x in (a, b):
        x.copy_(torch.randn(x.shape, generator=generator))
    return a, b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_torch(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = operands(*shape, dtype)
    exact = a.double().T @ b.double()
    assert_no_worse(weight_gradient.product(a, b), a.T @ b, exact, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adds_onto_fp32(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = operands(*shape, dtype)
    totals = [torch.full((shape[1], shape[2]), torch.nan) for _ in range(2)]
    for accumulate_, total in zip((weight_gradient.accumulate_, reference.accumulate_), totals, strict=True):
        accumulate_(total, a, b, first=True)
        accumulate_(total, -3 * a, b, first=False)
    exact = a.double().T @ b.double() + (-3 * a).double().T @ b.double()
    assert_no_worse(totals[0], totals[1], exact, isa)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    a, b = operands(700, 300, 90, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(weight_gradient.product(a, b))
    finally:
        torch.set_num_threads(threads)
    if cpu.has_weight_gradient():
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_nan_and_inf_spread_as_in_torchs(isa: str) -> None:
    a, b = operands(40, 50, 60, torch.bfloat16)
    a[7, 3], b[9, 11] = torch.nan, torch.inf
    assert torch.equal(weight_gradient.product(a, b).isnan(), (a.T @ b).isnan())


def test_operands_that_do_not_fit_are_refused() -> None:
    if not cpu.has_weight_gradient():
        pytest.skip("this processor has no tiles: torch's own product refuses them")
    a, b = operands(8, 4, 5, torch.bfloat16)
    with pytest.raises(ValueError, match=r"a \(8, 4\), b \(7, 5\)"):
        weight_gradient.product(a, b[:7])
    with pytest.raises(ValueError, match=r"and \(4, 4\)"):
        weight_gradient.accumulate_(torch.zeros(4, 4), a, b, first=True)


def test_operands_of_any_strides_reach_the_tiles_with_last_stride_1(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = operands(8, 4, 5, torch.bfloat16)
    given, strided = [], [a.T.contiguous().T, b.T.contiguous().T]
    monkeypatch.setattr(cpu, "has_weight_gradient", lambda: True)
    monkeypatch.setattr(cpu, "weight_gradient", lambda *arguments: given.append(arguments))
    weight_gradient.product(*strided)
    weight_gradient.accumulate_(torch.zeros(4, 5), *strided, first=True)
    assert [(a[3], b[3]) for a, b, *_ in given] == [((4, 1), (5, 1))] * 2


def test_strided_hidden_has_a_gradient_where_there_are_tiles() -> None:
    weight, labels = torch.randn(5, 16, dtype=torch.bfloat16), torch.arange(8) % 5
    hidden = torch.randn(16, 8, dtype=torch.bfloat16).t().requires_grad_()
    whole = hidden.detach().contiguous().requires_grad_()
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    for x, w in zip((hidden, whole), weights, strict=True):
        linear_cross_entropy(x, w, None, labels).backward()
    assert torch.equal(hidden.grad, whole.grad) and torch.equal(weights[0].grad, weights[1].grad)

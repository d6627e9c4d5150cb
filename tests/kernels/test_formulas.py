"""Functions that Triton's kernels compute by one formula for small arguments and another for large ones.

The ops hardly show them: a cap is used at scores of its own size, and a few steps of Adam see only small powers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from phi_fast.kernels.triton.adam import _one_minus_power
from phi_fast.kernels.triton.softcap import _tanh

ULP = 2.0**-23


@triton.jit
def _apply(x, out, FUNCTION: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, FUNCTION(tl.load(x + at)))


@triton.jit
def _apply_to_power(log_beta, t, out, n: tl.constexpr):
    for i in range(n):
        tl.store(out + i, _one_minus_power(tl.load(log_beta + i), tl.load(t + i)))


def magnitudes(low: float, high: float, n: int) -> Tensor:
    return torch.logspace(low, high, n, dtype=torch.float64).float()


def assert_relative_error(actual: Tensor, exact: Tensor, ulps: float) -> None:
    error = ((actual.double() - exact) / exact).abs()
    worst = error.argmax()
    assert error[worst] <= ulps * ULP, f"{actual[worst]} instead of {exact[worst]}: {error[worst] / ULP} ulps"


def test_triton_softcaps_tanh(device: str) -> None:
    x = magnitudes(-30, 2, 1024)
    x = torch.cat((x, -x)).to(device)
    out = torch.empty_like(x)
    _apply[(1,)](x, out, FUNCTION=_tanh, n=x.numel())
    assert_relative_error(out, x.double().tanh(), 4)


def test_triton_adams_bias_correction(device: str) -> None:
    """1 - β^t at the first million steps, with β from 0.1 to 1 - 1e-7. A GPU's exp errs by two units itself."""
    t = magnitudes(0, 6, 128).round()
    log_beta = torch.log1p(-magnitudes(-7, -0.046, 128).double()).float()
    t, log_beta = (x.to(device).contiguous() for x in (t.repeat(2), torch.cat((log_beta, log_beta.flip(0)))))
    out = torch.empty_like(t)
    _apply_to_power[(1,)](log_beta, t, out, n=t.numel())
    assert_relative_error(out, -torch.expm1(log_beta.double() * t.double()), 8)

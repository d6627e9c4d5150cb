"""`narrow` rounds as torch does: to the nearest, ties to the even neighbour, NaN and infinities as they are. `fma`
rounds once."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from phi_fast.kernels.triton.rounding import fma, narrow

LOW_HALVES = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Of fp32's bits below bf16's: exact, just above, just below a tie, the tie, just above, just below the next."""


@triton.jit
def _narrow(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = narrow(tl.load(x + at, mask=at < n), out.dtype.element_ty)
    tl.static_assert(value.dtype == out.dtype.element_ty)
    tl.store(out + at, value, mask=at < n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_sign_exponent_and_tie(dtype: torch.dtype, device: str) -> None:
    """All upper halves of fp32, with lower halves around bf16's ties; for fp16 its values and the ties between them.

    Of subnormal numbers only 0: the cast of Triton's interpreter distorts the others.
    """
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    x = (upper | torch.tensor(LOW_HALVES)).to(torch.int32).view(torch.float32).flatten()
    x = torch.cat(
        (x[x.abs() >= torch.finfo(torch.float32).tiny], x[x.isnan()], torch.tensor([0.0, -0.0, torch.inf, -torch.inf]))
    )
    if dtype == torch.float16:
        values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
        steps = torch.nextafter(values.half(), torch.tensor(torch.inf).half()).float() - values
        x = torch.cat((values, values + steps / 2, values + steps / 2 * (1 + 2**-10)))
    x = x.to(device)
    out = torch.empty_like(x, dtype=dtype)
    _narrow[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), BLOCK=4096)
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits)[numbers], expected.view(bits)[numbers])


@triton.jit
def _fma(x, y, z, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, fma(tl.load(x + at), y, tl.load(z + at)))


def test_a_fused_multiply_add_keeps_what_the_product_would_round_away(device: str) -> None:
    """Nothing would remain of x * y - round(x * y) after two roundings. float64 holds the exact value."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 1e6
    y = torch.tensor(math.log2(math.e) / 8).item()  # an fp32 number: the interpreter does not round scalars
    z = -(x * y)
    exact = x.double() * y + z.double()
    assert exact.abs().max() > 1e-3
    out = torch.empty_like(x, device=device)
    _fma[(1,)](x.to(device), y, z.to(device), out, BLOCK=256)
    assert torch.equal(out.cpu(), exact.float())
    x[0], x[1], z[2] = torch.inf, torch.nan, -torch.inf
    _fma[(1,)](x.to(device), y, z.to(device), out, BLOCK=256)
    assert out[0] == torch.inf and out[1].isnan() and out[2] == -torch.inf

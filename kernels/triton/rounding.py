"""Roundings that are the same on a GPU and in Triton's interpreter: to a storage dtype, and of a fused multiply-add."""

from __future__ import annotations

import triton
import triton.language as tl

from ..backend import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x (fp32) rounded to nearest even in DTYPE. The interpreter cuts bf16 off: there half a bit is added before."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        # Without the low half cleared, 0 would reach the interpreter's cast as a subnormal, which it turns into 1e-38.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x != x, float("nan"), rounded)  # cut off, a NaN of low bits alone would be infinite
    return x.to(DTYPE)


@triton.jit
def fma(x, y, z):
    """x * y + z in fp32, rounded once. The interpreter of Triton 3.6 rounds the product too: there fp64 holds it."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    return tl.fma(x, y, z)

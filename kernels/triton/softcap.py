"""The cap on logits of Gemma 2 (arXiv 2408.00118): softcap · tanh(x / softcap)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh in fp32, relative error about 2 units in the last place (Cephes' tanhf); NaN stays."""
    t = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(t, 10.0)) + 1.0)
    s = t * t
    small = -5.70498872745e-3 * s + 2.06390887954e-2
    small = small * s - 5.37397155531e-2
    small = small * s + 1.33314422036e-1
    small = small * s - 3.33332819422e-1
    small = small * s * t + t
    t = tl.where(t > 0.625, large, small)
    return tl.where(x < 0, -t, t)


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):
    """(softcap · tanh(x / softcap), its derivative), as Gemma 2 caps its logits; (x, 1) without a cap."""
    slope = 1.0
    if CAPPED:
        t = _tanh(tl.div_rn(x, softcap))
        x = softcap * t
        slope = 1.0 - t * t
    return x, slope

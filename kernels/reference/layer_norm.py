"""LayerNorm (Ba et al., arXiv 1607.06450) and RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in plain PyTorch.

The contract of `forward` and `backward`, which every back end keeps, is their docstrings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ResidualStream(NamedTuple):
    """What the forward pass adds to x and writes, beside the normalised rows. All (rows, d) but shift (d,)."""

    residual: Tensor | None = None
    summed: Tensor | None = None
    """x + residual, rounded to x's dtype: what is then normalised. Made where there is a residual and None is given."""
    shift: Tensor | None = None
    shifted: Tensor | None = None
    """What is normalised plus shift, for a matrix product to be added onto. Must not overlap x."""


UNTOUCHED = ResidualStream()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    stream: ResidualStream = UNTOUCHED,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x - mean) * rstd * weight + bias -> (out, mean, rstd), all rows in one pass.

    x (rows, d), rows at any stride, last stride 1; weight, bias (d,) in x's dtype; out as x. mean, rstd (rows,), fp32
    (fp64 for fp64), of the biased variance: rstd = (variance + eps) ** -0.5. Without bias it is RMSNorm: mean is None,
    and 0 in both formulas.
    """
    residual, summed, shift, shifted = stream
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        summed = torch.empty_like(x) if summed is None else summed
        x = torch.add(x, residual, out=summed)
    if shift is not None and shifted is not None:
        torch.add(x, shift, out=shifted)
    v = x.to(wide)
    mean = None if bias is None else v.mean(1)
    centred = v if mean is None else v - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    result = centred * rstd[:, None] * weight.to(wide)
    if bias is not None:
        result += bias.to(wide)
    out = result.to(x.dtype) if out is None else out.copy_(result)
    return out, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias) from dy (rows, d) and what forward normalised and returned.

    residual_grad (rows, d): the gradient that reaches x past the norm; added to dx before it is rounded. dx may be
    given, as a buffer (rows, d), and may be residual_grad or dy itself. dweight, dbias (d,) are fp32 (fp64 for fp64),
    summed in a fixed order; dbias is None where mean is (RMSNorm).
    """
    wide = rstd.dtype
    g = dy.to(wide)
    centred = x.to(wide) if mean is None else x.to(wide) - mean[:, None]
    normalised = centred * rstd[:, None]
    dweight, dbias = (g * normalised).sum(0), None if mean is None else g.sum(0)
    g = g * weight.to(wide)
    shared = 0 if mean is None else g.mean(1, keepdim=True)
    result = (g - shared - normalised * (g * normalised).mean(1, keepdim=True)) * rstd[:, None]
    if residual_grad is not None:
        result += residual_grad
    dx = result.to(x.dtype) if dx is None else dx.copy_(result)
    return dx, dweight, dbias

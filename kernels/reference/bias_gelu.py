"""GELU with a bias in plain PyTorch: Hendrycks and Gimpel, arXiv 1606.08415; "tanh" is GPT-2's form ("gelu_new").

The contract of `forward` and `backward`, which every back end keeps, is their docstrings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    approximate: str = "tanh",
    carry: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """gelu(x + bias). x (rows, n), rows at any stride, last stride 1; bias (n,) in x's dtype, or None; out as x.

    approximate: "tanh", or "none" for the exact form with erf. fp32 arithmetic (fp64 for fp64), rounded once.
    carry: (source, target), each (rows, width): source is copied into target in the same pass. It fills the columns
    that stand beside `out` in a matrix product's operand.
    """
    _carry(carry)
    result = F.gelu(_wide(x, bias), approximate=approximate)
    return result.to(x.dtype) if out is None else out.copy_(result)


def backward(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    *,
    dx: Tensor | None = None,
    activation: Tensor | None = None,
    approximate: str = "tanh",
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dbias) of forward: dx (rows, n), into the buffer given (rows at any stride) or a new one.

    activation: a buffer (rows, n) that receives gelu(x + bias) again, so that it need not be saved; it may be dout
    itself. dbias (n,): the column sums of dx before it is rounded, fp32 (fp64 for fp64), in a fixed order. carry: as
    in forward.
    """
    _carry(carry)
    u = _wide(x, bias)
    gradient = torch.ops.aten.gelu_backward(dout.to(u.dtype), u, approximate=approximate)
    if activation is not None:
        activation.copy_(F.gelu(u, approximate=approximate))
    dx = gradient.to(x.dtype) if dx is None else dx.copy_(gradient)
    return dx, gradient.sum(0)


def _wide(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) if bias is None else x.to(wide) + bias.to(wide)


def _carry(carry: tuple[Tensor, Tensor] | None) -> None:
    if carry is not None:
        source, target = carry
        target.copy_(source)

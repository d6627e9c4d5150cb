"""act(gate) · up in plain PyTorch: the middle of a gated MLP (Shazeer, arXiv 2002.05202).

The contract of `forward` and `backward`, which every back end keeps, is their docstrings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")


def forward(gate: Tensor, up: Tensor, *, out: Tensor | None = None, activation: str = "silu") -> Tensor:
    """act(gate) · up. gate, up (rows, n) of one dtype, rows at any stride, last stride 1; out as gate.

    activation: "silu", x · sigmoid(x), or "gelu_tanh", GELU in GPT-2's form. fp32 arithmetic (fp64 for fp64), rounded
    once.
    """
    result = _activate(_wide(gate), activation) * _wide(up)
    return result.to(gate.dtype) if out is None else out.copy_(result)


def backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """(dgate, dup) of forward, each (rows, n), into the buffers given (rows at any stride) or new ones."""
    wide, wide_gate = _wide(dout), _wide(gate)
    of_gate = _gradient(wide * _wide(up), wide_gate, activation)
    of_up = wide * _activate(wide_gate, activation)
    dgate = of_gate.to(gate.dtype) if dgate is None else dgate.copy_(of_gate)
    dup = of_up.to(up.dtype) if dup is None else dup.copy_(of_up)
    return dgate, dup


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def _gradient(dout: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(dout, x)
    return torch.ops.aten.gelu_backward(dout, x, approximate="tanh")

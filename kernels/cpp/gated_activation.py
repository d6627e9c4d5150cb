"""act(gate) · up in C++; the contract is `reference/gated_activation.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import described

_OP = "gated_activation"


def forward(gate: Tensor, up: Tensor, *, out: Tensor | None = None, activation: str = "silu") -> Tensor:
    """See `reference.gated_activation.forward`. Raises TypeError for another dtype, ValueError for a shape or
    stride."""
    out = gate.new_empty(gate.shape) if out is None else out
    operands = (described(_OP, x) for x in (gate, up, out))
    cpu.gated_activation_forward(activation == "silu", *operands, torch.get_num_threads())
    return out


def backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """See `reference.gated_activation.backward`. Raises TypeError for another dtype, ValueError for a shape or
    stride."""
    dgate = gate.new_empty(gate.shape) if dgate is None else dgate
    dup = up.new_empty(up.shape) if dup is None else dup
    operands = (described(_OP, x) for x in (dout, gate, up, dgate, dup))
    cpu.gated_activation_backward(activation == "silu", *operands, torch.get_num_threads())
    return dgate, dup

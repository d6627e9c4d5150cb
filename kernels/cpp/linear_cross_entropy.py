"""Cross entropy of one chunk of logits in C++: `reference/linear_cross_entropy.py`'s contract, fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference.linear_cross_entropy import Objective
from ._tensors import described, maybe, wide

_OP = "linear_cross_entropy"


def sum_into_(total: Tensor, addend: Tensor, *, first: bool) -> None:
    """See `reference.weight_gradient.sum_into_`."""
    _scaled(addend, total, 1.0, add=not first)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.linear_cross_entropy.scaled`."""
    out = torch.empty_like(x, dtype=dtype)
    _scaled(x, out, float(factor), add=False)
    return out


def _scaled(x: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
    cpu.scaled(described(_OP, x), described(_OP, out), factor, add, torch.get_num_threads())


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    objective: Objective,
    scale: Tensor,
    need_grad: bool,
    dbias: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_cross_entropy.cross_entropy_`. Raises TypeError for a dtype, ValueError for a shape."""
    ignore_index, label_smoothing, z_loss, class_weight, softcap = objective
    labels = labels.contiguous()
    wide_bias = None if bias is None else wide(bias)
    weight = None if class_weight is None else wide(class_weight)
    scale = wide(scale)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    cpu.cross_entropy(
        described(_OP, logits),
        described(_OP, labels),
        maybe(_OP, wide_bias),
        maybe(_OP, weight),
        1.0 if weight is None else float(weight.mean()),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        described(_OP, scale),
        need_grad,
        maybe(_OP, dbias),
        described(_OP, losses),
        torch.get_num_threads(),
    )
    return losses

"""Cross entropy of one chunk of logits in C++: `reference/linear_cross_entropy.py`'s contract, fp32, bf16 and fp16; and
in bf16, where the processor has instructions for its products, with the products and without stored logits."""

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


def stores_no_logits(dtype: torch.dtype, *, gradients: bool) -> bool:
    """Return whether `linear_cross_entropy` takes this dtype with the instruction set in use, and is the faster way.

    Gradients need the logits twice, a fourth product beside three. Where tiles multiply, it costs less than stored
    logits; dot products of pairs (AVX-512 BF16 without AMX) are so slow that it costs more.
    """
    return dtype == torch.bfloat16 and cpu.has_linear_cross_entropy() and (has_tiles() or not gradients)


def has_tiles() -> bool:
    """Return whether the instruction set in use multiplies bf16 by tiles."""
    return cpu.has_weight_gradient()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    objective: Objective,
    scale: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    first: bool,
) -> Tensor:
    """Losses (rows,) fp32 of the logits hidden · weightᵀ + bias, of which only small blocks exist, and gradients times
    `scale`, in fp32.

    hidden: (rows, d); weight: (V, d); bias: (V,) or None: bf16. labels, objective, scale: as for `cross_entropy_`. The
    options need nothing else: all of them are computed here.
    dhidden: (rows, d), which is written. dweight: (V, d), which is written where `first` and else added to. dbias:
        (V,), which is added to. All contiguous, or None where the gradient is not wanted.

    Raises TypeError for a dtype, ValueError for a shape, RuntimeError with an instruction set that has no bf16
    products.
    """
    ignore_index, label_smoothing, z_loss, class_weight, softcap = objective
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    labels, scale = labels.contiguous(), wide(scale)
    wide_bias = None if bias is None else wide(bias)
    wide_weight = None if class_weight is None else wide(class_weight)
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    cpu.linear_cross_entropy(
        described(_OP, hidden),
        described(_OP, weight),
        described(_OP, labels),
        maybe(_OP, wide_bias),
        maybe(_OP, wide_weight),
        1.0 if wide_weight is None else float(wide_weight.mean()),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        described(_OP, scale),
        maybe(_OP, dhidden),
        maybe(_OP, dweight),
        not first,
        maybe(_OP, dbias),
        described(_OP, losses),
        torch.get_num_threads(),
    )
    return losses

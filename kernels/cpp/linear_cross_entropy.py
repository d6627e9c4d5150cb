"""Cross entropy of one chunk of logits in C++: `reference/linear_cross_entropy.py`'s contract, fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import address, code, matrix, vector

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
    if x.shape != out.shape or not x.is_contiguous() or not out.is_contiguous():
        raise ValueError(f"{_OP}: {tuple(x.shape)} and {tuple(out.shape)}; expected contiguous tensors of one shape")
    from_code, to_code = code(_OP, x.dtype), code(_OP, out.dtype)
    cpu.scaled(from_code, to_code, x.numel(), address(x), address(out), factor, add, torch.get_num_threads())


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    scale: Tensor,
    need_grad: bool,
    dbias: Tensor | None = None,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See `reference.linear_cross_entropy.cross_entropy_`. Raises TypeError for a dtype, ValueError for a shape."""
    dtype = code(_OP, logits.dtype)
    rows, columns = logits.shape
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(f"{_OP}: labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({rows},)")
    if dbias is not None and (dbias.shape != (columns,) or dbias.dtype != torch.float32 or not dbias.is_contiguous()):
        raise ValueError(
            f"{_OP}: dbias is {dbias.dtype} {tuple(dbias.shape)}; expected contiguous float32 ({columns},)"
        )
    labels = labels.contiguous()
    wide_bias = None if bias is None else vector(_OP, "bias", bias, columns)
    weight = None if class_weight is None else vector(_OP, "class_weight", class_weight, columns)
    scale_by_row = scale.dim() > 0
    scale = vector(_OP, "scale", scale if scale_by_row else scale.reshape(1), rows if scale_by_row else 1)
    losses = logits.new_empty(rows, dtype=torch.float32)
    cpu.cross_entropy(
        dtype,
        rows,
        columns,
        matrix(_OP, "logits", logits, logits),
        address(labels),
        address(wide_bias),
        address(weight),
        1.0 if weight is None else float(weight.mean()),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        address(scale),
        scale_by_row,
        need_grad,
        address(dbias) if need_grad else 0,
        address(losses),
        torch.get_num_threads(),
    )
    return losses

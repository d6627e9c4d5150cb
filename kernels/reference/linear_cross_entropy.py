"""Cross entropy of one chunk of logits, in plain PyTorch.

The contract of `cross_entropy_`, which every back end keeps, is its docstring. The chunks, the matrix products and
autograd are the public op's (`kernels/linear_cross_entropy.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    """What is computed from a row of logits; `cross_entropy_` has the formulas."""

    ignore_index: int = -100
    """The loss and gradient of a row with this label are 0, whatever its logits hold."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    class_weight: Tensor | None = None
    """(V,) fp32, or None for 1 everywhere."""
    softcap: float | None = None
    """A number greater than 0, or None for no cap."""


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in x's dtype, rounded once to `dtype`. x (contiguous) fp32 or fp64; factor a scalar of that dtype."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def linear_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, objective: Objective) -> Tensor:
    """Losses (rows,) of hidden (rows, d), weight (V, d), bias (V,) and labels (rows,) int64, as `cross_entropy_` has
    them: fp32, or fp64 for fp64. This is the primitive of back ends that keep logits on the chip; here they are stored.
    """
    scale = torch.ones((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    return cross_entropy_(hidden @ weight.T, labels, bias, objective=objective, scale=scale, need_grad=False)


def losses_of_statistics(
    maximum: Tensor, total: Tensor, target: Tensor, mean: Tensor, labels: Tensor, vocab: int, objective: Objective
) -> Tensor:
    """Losses (rows,) from each row's maximum of its scores s, Σ exp(s - maximum), the label's score, and the mean of
    class weight · s, which counts with smoothed labels. All (rows,) fp32; labels int64; the formulas of
    `cross_entropy_`."""
    ignore_index, smoothing, z_loss, class_weight, _ = objective
    valid = (labels >= 0) & (labels < vocab)
    of_label: Tensor | float = 1.0
    of_all: Tensor | float = 1.0
    if class_weight is not None:
        of_label, of_all = class_weight[labels.where(valid, 0)], class_weight.mean()
    log_total = total.log()
    found = (1 - smoothing) * of_label * (log_total - (target - maximum))
    if smoothing:
        found = found + smoothing * (of_all * (log_total + maximum) - mean)
    if z_loss:
        found = found + z_loss * of_label * (maximum + log_total).square()
    return found.masked_fill(~valid, torch.nan).masked_fill(labels == ignore_index, 0.0)


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
    """Losses of a chunk's rows; where `need_grad`, the logits are overwritten by their gradient times `scale`.

    logits: (rows, V), rows at any stride, last stride 1; fp32, fp16, bf16 (the reference: fp64 too). Scratch: without
        `need_grad` their content after the call is not specified.
    labels: (rows,) int64. The loss and gradient of a row are NaN for a label outside [0, V) that is not ignore_index (a
        GPU cannot raise without a sync).
    bias: (V,) in the logits' dtype, added to them in fp32.
    scale: fp32 tensor on the same device: a scalar, or (rows,) with one per row.
    dbias: (V,) fp32, to which the column sums of gradient × scale are ADDED (deterministic); with `need_grad` only.
    Returns the losses, (rows,) fp32 (fp64 for fp64 logits), neither scaled nor averaged.

    With x = logits + bias, s = softcap · tanh(x / softcap) (or x), p = softmax(s), L = logsumexp(s), y the label,
    ε = label_smoothing, z = z_loss and w the class weights:
        loss     = (1-ε)·w_y·(L - s_y) + ε·mean(w·(L - s)) + z·w_y·L²     (z-loss: PaLM, arXiv 2204.02311, section 5)
        dloss/ds = p·((1-ε)·w_y + ε·mean(w) + 2·z·w_y·L) - (1-ε)·w_y·[column = y] - ε·w/V
        dloss/dx = dloss/ds · (1 - (s / softcap)²)
    """
    ignore_index, label_smoothing, z_loss, class_weight, softcap = objective
    wide = torch.promote_types(logits.dtype, torch.float32)
    vocab = logits.shape[1]
    ignored = labels == ignore_index
    valid = (labels >= 0) & (labels < vocab)
    y = labels.where(valid, 0).unsqueeze(1)  # (rows, 1)

    x = logits.to(wide)  # fp32 logits: themselves, and every step below is in place
    if bias is not None:
        x.add_(bias)
    slope = None
    if softcap is not None:
        x.div_(softcap).tanh_()
        slope = x.square().neg_().add_(1) if need_grad else None
        x.mul_(softcap)
    # The maximum is taken off first and never added back but for z-loss: logits of hundreds would cost the loss and the
    # softmax the digits that L = maximum + log(total) has no room for.
    maximum = x.amax(1, keepdim=True)
    x.sub_(maximum)
    target = x.gather(1, y)
    of_label: Tensor | float = 1.0 if class_weight is None else class_weight[y]  # (rows, 1)
    of_target = (1 - label_smoothing) * of_label
    of_others = 0.0 if class_weight is None else label_smoothing * class_weight.mean()
    of_lse = 1.0 if class_weight is None else of_target + of_others
    mean: Tensor | float = 0.0
    if label_smoothing:
        mean = (x if class_weight is None else x * class_weight).mean(1, keepdim=True)
    x.exp_()
    total = x.sum(1, keepdim=True)
    lse = maximum + total.log()
    if class_weight is None:
        losses = total.log() - of_target * target - label_smoothing * mean
    else:
        losses = of_target * (total.log() - target) + (of_others * total.log() - label_smoothing * mean)
    if z_loss:
        losses = losses + z_loss * of_label * lse.square()
    losses = losses.squeeze(1).masked_fill(~valid, torch.nan).masked_fill(ignored, 0.0)
    if not need_grad:
        return losses

    dx = x.mul_((of_lse + 2 * z_loss * of_label * lse) / total)
    dx.scatter_add_(1, y, -of_target * torch.ones_like(lse))
    if label_smoothing:
        dx.sub_(label_smoothing / vocab * (1.0 if class_weight is None else class_weight))
    if slope is not None:
        dx.mul_(slope)
    dx.mul_(scale.reshape(-1, 1)).masked_fill_(~valid.unsqueeze(1), torch.nan).masked_fill_(ignored.unsqueeze(1), 0.0)
    if dbias is not None:
        dbias.add_(dx.sum(0))
    if dx is not logits:
        logits.copy_(dx)
    return losses

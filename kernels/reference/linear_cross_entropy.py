"""Cross entropy of one chunk of logits, in plain PyTorch.

The contract of `cross_entropy_`, which every back end keeps, is its docstring. The chunks, the matrix products and
autograd are the public op's (`kernels/linear_cross_entropy.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in x's dtype, rounded once to `dtype`. x (contiguous) fp32 or fp64; factor a scalar of that dtype."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


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
) -> Tensor:
    """Losses of a chunk's rows; where `need_grad`, the logits are overwritten by their gradient times `scale`.

    logits: (rows, V), rows at any stride, last stride 1; fp32, fp16, bf16 (the reference: fp64 too). Scratch: without
        `need_grad` their content after the call is not specified.
    labels: (rows,) int64. `ignore_index`: the row's loss and gradient are 0, whatever its logits hold. Any other label
        outside [0, V): the row's loss and gradient are NaN (a GPU cannot raise without a sync).
    bias: (V,) in the logits' dtype, added to them in fp32.
    scale: fp32 scalar tensor on the same device.
    dbias: (V,) fp32, to which the column sums of gradient × scale are ADDED (deterministic); with `need_grad` only.
    Returns the losses, (rows,) fp32 (fp64 for fp64 logits), neither scaled nor averaged.

    With x = logits + bias, p = softmax(x), L = logsumexp(x), ε = label_smoothing, z = z_loss and y the label:
        loss    = L - (1-ε)·x_y - ε·mean(x) + z·L²          (z-loss: PaLM, arXiv 2204.02311, section 5)
        dloss/dx = p·(1 + 2·z·L) - (1-ε)·[column = y] - ε/V
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    vocab = logits.shape[1]
    ignored = labels == ignore_index
    valid = (labels >= 0) & (labels < vocab)
    y = labels.where(valid, 0).unsqueeze(1)  # (rows, 1)

    x = logits.to(wide)  # fp32 logits: themselves, and every step below is in place
    if bias is not None:
        x.add_(bias)
    # The maximum is taken off first and never added back but for z-loss: logits of hundreds would cost the loss and the
    # softmax the digits that L = maximum + log(total) has no room for.
    maximum = x.amax(1, keepdim=True)
    x.sub_(maximum)
    target = x.gather(1, y)
    mean = x.mean(1, keepdim=True) if label_smoothing else 0.0
    x.exp_()
    total = x.sum(1, keepdim=True)
    lse = maximum + total.log()
    losses = total.log() - (1 - label_smoothing) * target - label_smoothing * mean
    if z_loss:
        losses = losses + z_loss * lse.square()
    losses = losses.squeeze(1).masked_fill(~valid, torch.nan).masked_fill(ignored, 0.0)
    if not need_grad:
        return losses

    dx = x.mul_((1 + 2 * z_loss * lse) / total)
    dx.scatter_add_(1, y, torch.full_like(lse, label_smoothing - 1))
    if label_smoothing:
        dx.sub_(label_smoothing / vocab)
    dx.mul_(scale).masked_fill_(~valid.unsqueeze(1), torch.nan).masked_fill_(ignored.unsqueeze(1), 0.0)
    if dbias is not None:
        dbias.add_(dx.sum(0))
    if dx is not logits:
        logits.copy_(dx)
    return losses

"""linear_cross_entropy with reduction="none": a loss for each row, and a gradient that arrives for each row.

The gradients of weight and bias are sums over rows, each times the row's incoming gradient, which the forward pass does
not know. So it keeps nothing, and the backward pass forms the logits again, chunk by chunk, as Apple's ml-cross-entropy
does (arXiv 2411.09009). In fp16, dlogits are stored times their row's incoming gradient, divided by the largest of
these and times the power of two that cannot overflow: an element underflows only where plain autograd loses it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, dispatch
from . import linear_cross_entropy_chunks as chunks
from .reference.linear_cross_entropy import Objective


@torch.library.custom_op("phi_fast::linear_cross_entropy_rows", mutates_args=())
def row_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    class_weight: Tensor | None,
    softcap: float | None,
    chunk_size: int | None,
) -> Tensor:
    """Losses (rows,) of hidden (rows, d) and labels (rows,); fp32, or fp64 for fp64."""
    if hidden.device.type == "cpu":
        chunks.check_labels(labels, weight.shape[0], ignore_index)
    objective = Objective(ignore_index, label_smoothing, z_loss, class_weight, softcap)
    one = torch.ones((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    return chunks.losses_and_gradients(hidden, weight, bias, labels, objective, one, chunk_size, [False] * 3)[0]


@row_losses.register_fake
def _(hidden, weight, bias, labels, *_):
    return hidden.new_empty(hidden.shape[:1], dtype=torch.promote_types(hidden.dtype, torch.float32))


@torch.library.custom_op("phi_fast::linear_cross_entropy_rows_backward", mutates_args=())
def _row_gradients(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    class_weight: Tensor | None,
    softcap: float | None,
    chunk_size: int | None,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients that are wanted of hidden, weight and bias, in hidden's dtype."""
    objective = Objective(ignore_index, label_smoothing, z_loss, class_weight, softcap)
    scale, inverse = _stored(grad_losses, chunks.working_dtype(hidden), objective, labels)
    grads = chunks.losses_and_gradients(hidden, weight, bias, labels, objective, scale, chunk_size, wanted)[1:]
    kernel = backend.implementation("linear_cross_entropy", hidden.device)
    found = [grad for grad, want in zip(grads, wanted, strict=True) if want]
    return [g.to(hidden.dtype) if inverse is None else kernel.scaled(g, inverse, hidden.dtype) for g in found]


def _stored(grad: Tensor, dtype: torch.dtype, objective: Objective, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what each row's dlogits are stored times, what takes it out again); only fp16 needs anything but `grad`."""
    if dtype != torch.float16 or not len(grad):
        return grad, None
    largest = grad.abs().where(grad.isfinite(), 0).amax().clamp(min=torch.finfo(grad.dtype).tiny)
    scale = chunks.storage_scale(dtype, objective, labels)
    return grad / largest * scale, largest / scale


@_row_gradients.register_fake
def _(grad_losses, hidden, weight, bias, labels, ignore_index, smoothing, z, class_weight, softcap, chunk_size, wanted):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [hidden.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _keep(ctx, inputs, output):
    *tensors, ignore_index, smoothing, z, class_weight, softcap, chunk_size = inputs
    ctx.save_for_backward(*tensors, class_weight)
    ctx.options = (ignore_index, smoothing, z), (softcap, chunk_size)


def _backward(ctx, grad_losses):
    *tensors, class_weight = ctx.saved_tensors
    first, last = ctx.options
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(_row_gradients(grad_losses.contiguous(), *tensors, *first, class_weight, *last, wanted))
    return *(next(found) if want else None for want in wanted), *[None] * 7


row_losses.register_autograd(_backward, setup_context=_keep)
dispatch.once("linear_cross_entropy", _row_gradients)

"""The language-model head and its loss without the logits: matrix product and cross entropy, chunk by chunk of rows.

Never more than one chunk of logits exists. Its gradient overwrites it in place (as in Liger-Kernel, arXiv 2410.10989)
and is multiplied into the gradients of hidden and weight before the next chunk: the gradients are formed in the forward
pass, before the loss scale arrives. In fp16 this requires:

- dlogits = softmax - onehot are stored times a power of two, without the 1/N of the mean (`storage_scale`);
- the gradients of hidden, weight and bias stay fp32 until the backward pass: the products accumulate in fp32 and are
  written in fp32, where neither the power of two nor a large weight can overflow;
- backward multiplies by grad_output / (N · power of two) in fp32, and rounds once to the parameters' dtype.

So an element underflows only where scaled plain autograd loses it too. `linear_cross_entropy_chunks.py` has the chunks,
`linear_cross_entropy_rows.py` reduction="none", whose gradients wait for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import autocast, backend, dispatch
from . import linear_cross_entropy_chunks as chunks
from .linear_cross_entropy_rows import row_losses
from .reference.linear_cross_entropy import Objective

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    loss_scale: float | Tensor | None = None,
    chunk_size: int | None = None,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross entropy of softmax(hidden · weightᵀ + bias) against labels, without materialising the logits.

    hidden: (..., d); weight: (V, d); bias: (V,) or None: all fp32, fp16 or bf16 (the reference back end: or fp64).
    labels: (...) int64, `ignore_index` where a position does not count.
    label_smoothing: ε in [0, 1]: the target is (1-ε)·onehot + ε/V. z_loss: z >= 0 adds z·logsumexp² to each position.
    class_weight: (V,), the weight of a position by its label, as `weight` in torch's cross_entropy (label smoothing
        weighs each class with its own, and the mean divides by the sum of the labels' weights); it applies to the
        z-loss too. Converted to fp32. No gradient.
    softcap: c > 0: the logits are c·tanh(logits / c), as in Gemma 2 (arXiv 2408.00118).
    reduction: "mean" over the positions that count (by a device scalar: no host sync), "sum", or "none" for each
        position's loss, (...) like labels, 0 where it does not count. With "none" the backward pass forms the logits
        again, chunk by chunk: it costs one more product, and keeps no gradient until then.
    loss_scale: factor on fp16 dlogits while they are stored; it is divided out again, and affects only what
        underflows. None: the largest power of two that cannot overflow. fp32 and bf16 need none, nor does "none", whose
        incoming gradient takes its place.
    chunk_size: rows of logits held at a time (in bf16 on a CPU with AMX, where logits exist only as
        small blocks: rows whose gradients are formed together). None: as many as take the memory of weight's fp32
        gradient, but at least 256 (on a CPU 1024).
    Returns the loss: fp32 (fp64 for fp64), a scalar unless reduction is "none". The mean is NaN where no
        position counts, with zero gradients, as in torch.

    Under torch.autocast hidden, weight and bias are cast to its dtype, as F.linear does.
    Deterministic: two runs agree bit for bit. Where no gradient is wanted (no_grad, or nothing requires it) none is
    formed. Not differentiable twice.

    Raises ValueError for a shape, dtype, device or option that does not fit, and, on a CPU, for a label outside [0, V)
    that is not `ignore_index`. On a GPU, where looking would be a sync, such a label makes loss and gradients NaN.
    """
    scale_tensor = loss_scale if isinstance(loss_scale, Tensor) else None
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "loss_scale": scale_tensor}
    tensors["class_weight"] = class_weight
    by_library = dispatch.by_library("linear_cross_entropy", **tensors)
    if autocast.active(hidden):
        hidden, weight = autocast.lowered(hidden), autocast.lowered(weight)
        bias = None if bias is None else autocast.lowered(bias)
    _check(hidden, weight, bias, labels, label_smoothing, z_loss, reduction, chunk_size)
    class_weight = _checked_options(hidden, weight, class_weight, softcap)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if reduction == "none":
        objective = (ignore_index, label_smoothing, z_loss, class_weight, softcap)
        return row_losses(rows, weight, bias, labels.reshape(-1), *objective, chunk_size).view(labels.shape)
    recording = torch.is_grad_enabled()
    wanted = [recording and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if isinstance(loss_scale, (float, int)):
        loss_scale = torch.full((), float(loss_scale), device=hidden.device)
    mean = reduction == "mean"
    options = (ignore_index, label_smoothing, z_loss, mean, loss_scale, chunk_size, wanted, class_weight, softcap)
    if by_library:
        return _linear_cross_entropy_op(rows, weight, bias, labels.reshape(-1), *options)[0]
    if not any(wanted):
        return _compute(rows, weight, bias, labels.reshape(-1), *options)[0]
    return _LinearCrossEntropy.apply(rows, weight, bias, labels.reshape(-1), *options)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    chunk_size: int | None,
) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected hidden (..., d) and weight (V, d)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({weight.shape[0]},), a value for each row of weight")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)}: expected {tuple(hidden.shape[:-1])}, one per row of hidden")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: expected torch.int64; convert with labels.long()")
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden is {hidden.dtype}: expected one of {', '.join(map(str, FLOATS))}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}: expected one dtype; convert one")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: expected one device")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}: expected a value from 0 to 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss}: expected a finite value >= 0")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1 row")


def _checked_options(
    hidden: Tensor, weight: Tensor, class_weight: Tensor | None, softcap: float | None
) -> Tensor | None:
    """class_weight in fp32 (fp64 beside fp64)."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: expected a finite value > 0, or None for no cap")
    if class_weight is None:
        return None
    if class_weight.shape != weight.shape[:1] or not class_weight.is_floating_point():
        raise ValueError(
            f"class_weight is {class_weight.dtype} {tuple(class_weight.shape)}: expected floating point "
            f"({weight.shape[0]},), a value for each row of weight"
        )
    if class_weight.device != hidden.device:
        raise ValueError(f"class_weight is on {class_weight.device} and hidden on {hidden.device}: expected one device")
    if class_weight.requires_grad:
        raise ValueError("class_weight requires a gradient, and has none: pass class_weight.detach()")
    return class_weight.to(torch.promote_types(hidden.dtype, torch.float32))


@torch.no_grad()
def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    loss_scale: Tensor | None,
    chunk_size: int | None,
    wanted: list[bool],
    class_weight: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the fp32 gradients of hidden, weight and bias times scale and N (empty where not `wanted`), and the
    fp32 scalar that takes both out again."""
    if hidden.device.type == "cpu":
        chunks.check_labels(labels, weight.shape[0], ignore_index)
    objective = Objective(ignore_index, label_smoothing, z_loss, class_weight, softcap)
    dtype = chunks.working_dtype(hidden)
    scale = chunks.storage_scale(dtype, objective, labels)
    if loss_scale is not None:
        scale = loss_scale.to(scale.dtype)
    arguments = (hidden, weight, bias, labels, objective, scale, chunk_size, wanted)
    losses, dhidden, dweight, dbias = chunks.losses_and_gradients(*arguments)
    if not mean:
        return losses.sum(), dhidden, dweight, dbias, 1 / scale
    count = chunks.label_weights(objective, labels).sum()
    nothing = (labels == ignore_index).all()
    return losses.sum() / count, dhidden, dweight, dbias, 1 / (scale * count.masked_fill(nothing, 1))


def _gradients(
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor],
    saved: tuple[Tensor, ...],
    wanted: list[bool],
    dtype: torch.dtype,
    grad_loss: Tensor,
) -> list:
    *grads, inverse = saved
    factor = grad_loss * inverse
    return [scaled(g, factor, dtype) if want else None for g, want in zip(grads, wanted, strict=True)]


def _scaled_by_torch(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels' `scaled` for tensors without memory, and for graphs."""
    return (x * factor).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, *arguments):
        loss, *saved = _compute(hidden, weight, bias, labels, *arguments)
        ctx.save_for_backward(*saved)
        ctx.wanted, ctx.dtype = arguments[6], hidden.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        saved = ctx.saved_tensors
        if dispatch.backward_by_library("linear_cross_entropy", grad_loss):
            grads = _gradients(_scaled_by_torch, saved, ctx.wanted, ctx.dtype, grad_loss)
            return *dispatch.constants("linear_cross_entropy", grads), *[None] * 10
        kernel = backend.implementation("linear_cross_entropy", grad_loss.device)
        return *_gradients(kernel.scaled, saved, ctx.wanted, ctx.dtype, grad_loss), *[None] * 10


@torch.library.custom_op("phi_fast::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    loss_scale: Tensor | None,
    chunk_size: int | None,
    wanted: list[bool],
    class_weight: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_compute` as an operator that torch.compile keeps whole."""
    options = (ignore_index, label_smoothing, z_loss, mean, loss_scale, chunk_size, wanted, class_weight, softcap)
    return _compute(hidden, weight, bias, labels, *options)


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, ignore_index, smoothing, z, mean, scale, chunk_size, wanted, *_):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grads = [hidden.new_empty(shape if want else (0,), dtype=wide) for shape, want in zip(shapes, wanted, strict=True)]
    return hidden.new_empty((), dtype=wide), *grads, hidden.new_empty((), dtype=wide)


def _keep(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.dtype = inputs[10], inputs[0].dtype  # type: ignore[attr-defined]


def _op_backward(ctx, grad_loss, *_):
    grads = _gradients(_scaled_by_torch, ctx.saved_tensors, ctx.wanted, ctx.dtype, grad_loss)
    return *dispatch.constants("linear_cross_entropy", grads), *[None] * 10


_linear_cross_entropy_op.register_autograd(_op_backward, setup_context=_keep)

"""The language-model head and its loss without the logits: matrix product and cross entropy, chunk by chunk of rows.

Never more than one chunk of logits exists. Its gradient overwrites it in place (as in Liger-Kernel, arXiv 2410.10989)
and is multiplied into the gradients of hidden and weight before the next chunk: the gradients are formed in the forward
pass, before the loss scale arrives. What that takes in fp16:

- dlogits = softmax - onehot are stored times a power of two, without the 1/N of the mean (`_storage_scale`);
- the gradients of hidden, weight and bias stay fp32 until the backward pass: the products accumulate in fp32 and are
  written in fp32, where neither the power of two nor a large weight can overflow;
- backward multiplies by grad_output / (N · power of two) in fp32, and rounds once to the parameters' dtype.

So an element underflows only where scaled plain autograd loses it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import backend, dispatch
from .reference.weight_gradient import wide_product

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
) -> Tensor:
    """Cross entropy of softmax(hidden · weightᵀ + bias) against labels, without materialising the logits.

    hidden: (..., d); weight: (V, d); bias: (V,) or None: all fp32, fp16 or bf16 (the reference back end: or fp64).
    labels: (...) int64, `ignore_index` where a position does not count.
    label_smoothing: ε in [0, 1]: the target is (1-ε)·onehot + ε/V. z_loss: z >= 0 adds z·logsumexp² to each position.
    reduction: "mean" over the positions that count (by a device scalar: no host sync), or "sum".
    loss_scale: what fp16 dlogits are multiplied by while they are stored; it is divided out again and changes no result
        but what underflows. None: the largest power of two that cannot overflow. fp32 and bf16 need none.
    chunk_size: rows of logits held at a time. None: as many as cost the bytes of weight's fp32 gradient, but at least
        256, on a CPU 1024.
    Returns the loss: an fp32 scalar (fp64 for fp64). NaN where no position counts, with zero gradients, as in torch.

    Deterministic: two runs agree bit for bit. Where no gradient is wanted (no_grad, or nothing requires it) none is
    formed. Not differentiable twice.

    Raises ValueError for a shape, dtype, device or option that does not fit, and, on a CPU, for a label outside [0, V)
    that is not `ignore_index`. On a GPU, where looking would be a sync, such a label makes loss and gradients NaN.
    """
    scale_tensor = loss_scale if isinstance(loss_scale, Tensor) else None
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "loss_scale": scale_tensor}
    by_library = dispatch.by_library("linear_cross_entropy", **tensors)
    _check(hidden, weight, bias, labels, label_smoothing, z_loss, reduction, chunk_size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    recording = torch.is_grad_enabled()
    wanted = [recording and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if isinstance(loss_scale, float | int):
        loss_scale = torch.full((), float(loss_scale), device=hidden.device)
    arguments = (ignore_index, label_smoothing, z_loss, reduction == "mean", loss_scale, chunk_size, wanted)
    if by_library:
        return _linear_cross_entropy_op(rows, weight, bias, labels.reshape(-1), *arguments)[0]
    if not any(wanted):
        return _compute(rows, weight, bias, labels.reshape(-1), *arguments)[0]
    return _LinearCrossEntropy.apply(rows, weight, bias, labels.reshape(-1), *arguments)


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
        raise ValueError(f"labels {tuple(labels.shape)}: expected {tuple(hidden.shape[:-1])}, one a row of hidden")
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
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1 row")


def _check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """On a CPU, where it costs no sync: refuse labels that would index outside the logits."""
    outside = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels[{row}]={int(labels[row])} (flattened): expected 0 to {vocab - 1}, or ignore_index={ignore_index}"
        )


def _working_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: hidden's, but fp32 for 16-bit tensors on a CPU without bf16 instructions, which
    would multiply them 20 to 50 times slower."""
    if hidden.device.type != "cpu" or hidden.dtype in (torch.float32, torch.float64):
        return hidden.dtype
    native = hidden.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def rows_of_a_chunk(tokens: int, d: int, itemsize: int, *, on_cpu: bool, limit: int | None = None) -> int:
    """Rows of logits held at a time, in equal chunks of at most `limit`; None: as many as cost the bytes of weight's
    fp32 gradient, and at least 256, on a CPU 1024: its products pack their operands anew for every chunk."""
    limit = limit or max(1024 if on_cpu else 256, 4 * d // itemsize)
    return math.ceil(tokens / max(1, math.ceil(tokens / limit)))


def _storage_scale(dtype: torch.dtype, z_loss: float) -> float:
    """The power of two under which dlogits are stored.

    |p·(1 + 2·z·L) - target| <= 1 + 2·z·|L|, and |L| <= 65504 + log(V) < 65536 where the logits are finite in fp16. The
    largest power of two that keeps this below 65504 is 2^15 without z-loss. Scaled plain autograd stores dlogits · loss
    scale / N, which overflows beyond 65504 just so: what it can keep is kept here, to within a factor of 2.
    """
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** (15 - math.ceil(math.log2(1 + 2 * z_loss * 65536)))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the fp32 gradients of hidden, weight and bias times scale and N (empty where not `wanted`), and the
    fp32 scalar that takes both out again."""
    if hidden.device.type == "cpu":
        _check_labels(labels, weight.shape[0], ignore_index)
    kernel = backend.implementation("linear_cross_entropy", hidden.device)
    gradient = backend.implementation("weight_gradient", hidden.device)
    dtype = _working_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    tokens, (vocab, d) = hidden.shape[0], weight.shape
    for_hidden, for_weight, for_bias = wanted

    scale = (
        hidden.new_full((), _storage_scale(dtype, z_loss), dtype=wide) if loss_scale is None else loss_scale.to(wide)
    )
    losses = hidden.new_empty(tokens, dtype=wide)
    dhidden = hidden.new_empty(hidden.shape if for_hidden else (0,), dtype=wide)
    sums = hidden.new_empty if tokens else hidden.new_zeros  # the first chunk's product is where they start
    dweight = sums(weight.shape if for_weight else (0,), dtype=wide)
    dbias = hidden.new_zeros(vocab if for_bias else 0, dtype=wide)

    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    on_cpu = hidden.device.type == "cpu"
    size = rows_of_a_chunk(tokens, d, dtype.itemsize, on_cpu=on_cpu, limit=chunk_size)
    # Rows begin at multiples of 64 elements, so that a vocabulary of odd size keeps wide loads and fast products.
    # oneDNN's AMX product reads on to there, and zero times NaN is NaN: what the memory held before must not show.
    buffer = torch.empty(size, math.ceil(vocab / 64) * 64, dtype=dtype, device=hidden.device)
    buffer[:, vocab:] = 0
    buffer = buffer[:, :vocab]
    for start in range(0, tokens, size or 1):
        rows = slice(start, min(start + size, tokens))
        h = hidden[rows].to(dtype)
        logits = torch.mm(h, weight.T, out=buffer[: h.shape[0]])  # (rows, V)
        losses[rows] = kernel.cross_entropy_(
            logits,
            labels[rows],
            bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            scale=scale,
            need_grad=any(wanted),
            dbias=dbias if for_bias else None,
        )
        if for_hidden:
            dhidden[rows] = wide_product(logits, weight)
        if for_weight:
            gradient.accumulate_(dweight, logits, h, first=start == 0)

    count = (labels != ignore_index).sum()
    loss = losses.sum() / count if mean else losses.sum()
    inverse = 1 / (scale * count.clamp(min=1)) if mean else 1 / scale
    return loss, dhidden, dweight, dbias, inverse


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
        ctx.wanted, ctx.dtype = arguments[-1], hidden.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        saved = ctx.saved_tensors
        if dispatch.backward_by_library("linear_cross_entropy", grad_loss):
            grads = _gradients(_scaled_by_torch, saved, ctx.wanted, ctx.dtype, grad_loss)
            return *dispatch.constants("linear_cross_entropy", grads), *[None] * 8
        kernel = backend.implementation("linear_cross_entropy", grad_loss.device)
        return *_gradients(kernel.scaled, saved, ctx.wanted, ctx.dtype, grad_loss), *[None] * 8


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_compute` as an operator that torch.compile keeps whole."""
    return _compute(
        hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, mean, loss_scale, chunk_size, wanted
    )


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, mean, loss_scale, chunk_size, wanted):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grads = [hidden.new_empty(shape if want else (0,), dtype=wide) for shape, want in zip(shapes, wanted, strict=True)]
    return hidden.new_empty((), dtype=wide), *grads, hidden.new_empty((), dtype=wide)


def _keep(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.dtype = inputs[-1], inputs[0].dtype  # type: ignore[attr-defined]


def _op_backward(ctx, grad_loss, *_):
    grads = _gradients(_scaled_by_torch, ctx.saved_tensors, ctx.wanted, ctx.dtype, grad_loss)
    return *dispatch.constants("linear_cross_entropy", grads), *[None] * 8


_linear_cross_entropy_op.register_autograd(_op_backward, setup_context=_keep)

"""Losses and gradients of linear_cross_entropy, chunk by chunk of rows: never more than one chunk of logits exists, and
no more than small blocks where `backend.logits_stay_in_cache`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import autocast, backend
from .reference.linear_cross_entropy import Objective
from .reference.weight_gradient import wide_product


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Refuse, on a CPU, where it costs no sync, labels that would index outside the logits."""
    outside = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels[{row}]={int(labels[row])} (flattened): expected 0 to {vocab - 1}, or ignore_index={ignore_index}"
        )


def working_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: hidden's, but fp32 for 16-bit tensors on a CPU without bf16 instructions, which
    would multiply them 20 to 50 times slower."""
    if hidden.device.type != "cpu" or hidden.dtype in (torch.float32, torch.float64):
        return hidden.dtype
    native = hidden.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def rows_of_a_chunk(tokens: int, d: int, itemsize: int, *, on_cpu: bool, limit: int | None = None) -> int:
    """Return the rows of logits held at a time, in equal chunks of at most `limit`. None: as many as take the memory of
    weight's fp32 gradient, but at least 256, or 1024 on a CPU, whose products pack their operands for every chunk."""
    limit = limit or max(1024 if on_cpu else 256, 4 * d // itemsize)
    return math.ceil(tokens / max(1, math.ceil(tokens / limit)))


def storage_scale(dtype: torch.dtype, objective: Objective, labels: Tensor) -> Tensor:
    """The power of two under which dlogits are stored, a scalar on the device of `labels`; `dtype`: the logits'.

    |p·(1 + 2·z·L) - target| <= 1 + 2·z·|L|, and |L| <= 65504 + log(V) < 65536 where the logits are finite in fp16. The
    largest power of two that keeps this below 65504 is 2^15 without z-loss. Plain autograd stores dlogits · loss scale
    / N, which overflows beyond 65504 too: whatever it can represent is representable here, to within a factor of 2.
    With class weights, the largest of them takes the place of the 1: of the labels', and with smoothing of all classes.
    """
    wide = torch.promote_types(dtype, torch.float32)
    _, smoothing, z, weight, _ = objective
    if dtype != torch.float16:
        return torch.ones((), dtype=wide, device=labels.device)
    if weight is None or not len(labels):
        return torch.full((), 2.0 ** (15 - math.ceil(math.log2(1 + 2 * z * 65536))), dtype=wide, device=labels.device)
    of_labels = label_weights(objective, labels).abs().amax()
    bound = (1 - smoothing + 2 * z * 65536) * of_labels + smoothing * weight.abs().amax()
    return torch.exp2(15 - bound.clamp(min=2.0**-60).log2().ceil())


def label_weights(objective: Objective, labels: Tensor) -> Tensor:
    """(rows,): the class weight of each label, 0 for labels that do not count."""
    weight = objective.class_weight
    counts = labels != objective.ignore_index
    if weight is None:
        return counts
    inside = counts & (labels >= 0) & (labels < len(weight))
    return torch.where(inside, weight[labels.where(inside, 0)], 0)


@torch.no_grad()
@autocast.off
def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    objective: Objective,
    scale: Tensor,
    chunk_size: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses (rows,), and the fp32 gradients of hidden, weight and bias of their sum, empty where not `wanted`).

    scale: what each row's gradient is multiplied by, one for all or (rows,). All are fp32 (fp64 for fp64).
    """
    kernel = backend.implementation("linear_cross_entropy", hidden.device)
    gradient = backend.implementation("weight_gradient", hidden.device)
    dtype = working_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    tokens, (vocab, d) = hidden.shape[0], weight.shape
    for_hidden, for_weight, for_bias = wanted
    if not any(wanted) and backend.logits_stay_on_chip(hidden.device):
        nothing = hidden.new_empty(0, dtype=wide)
        return kernel.linear_losses(hidden, weight, bias, labels, objective), nothing, nothing.clone(), nothing.clone()

    losses = hidden.new_empty(tokens, dtype=wide)
    dhidden = hidden.new_empty(hidden.shape if for_hidden else (0,), dtype=wide)
    sums = hidden.new_empty if tokens else hidden.new_zeros  # the first chunk's product is where they start
    dweight = sums(weight.shape if for_weight else (0,), dtype=wide)
    dbias = hidden.new_zeros(vocab if for_bias else 0, dtype=wide)

    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    on_cpu = hidden.device.type == "cpu"
    size = rows_of_a_chunk(tokens, d, dtype.itemsize, on_cpu=on_cpu, limit=chunk_size)
    if backend.logits_stay_in_cache(hidden.device, dtype, gradients=any(wanted)):
        for start in range(0, tokens, size or 1):
            rows = slice(start, min(start + size, tokens))
            losses[rows] = kernel.linear_cross_entropy(
                hidden[rows],
                weight,
                bias,
                labels[rows],
                objective=objective,
                scale=scale[rows] if scale.dim() else scale,
                dhidden=dhidden[rows] if for_hidden else None,
                dweight=dweight if for_weight else None,
                dbias=dbias if for_bias else None,
                first=start == 0,
            )
        return losses, dhidden, dweight, dbias
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
            objective=objective,
            scale=scale[rows] if scale.dim() else scale,
            need_grad=any(wanted),
            dbias=dbias if for_bias else None,
        )
        if for_hidden:
            wide_product(logits, weight, out=dhidden[rows])
        if for_weight:
            gradient.accumulate_(dweight, logits, h, first=start == 0)
    return losses, dhidden, dweight, dbias

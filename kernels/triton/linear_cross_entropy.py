"""Cross entropy of a chunk of logits in Triton: a program per row, gradient in place, and column sums for the bias.

Of a row z of logits with label t:

    lse = m + log Σ_j exp(z_j - m), m = max_j z_j;  loss = lse - z_t;  dz_j = exp(z_j - lse) - [j = t];  db = Σ_rows dz

Bytes per element of the chunk (16-bit): 2 read and, with the gradient, 2 written; the second read of a row comes from
the L2 cache, which holds the rows in flight. The bias gradient reads the chunk once more: 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.linear_cross_entropy import (
    Objective,
    scaled,  # noqa: F401  (torch's own GPU kernel does it in one pass)
)
from .common import Launch, next_power_of_2
from .launching import launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

BLOCK = 4096  # columns at a time: with 512 threads, 8 each
WARPS = 16
BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


class Tile(NamedTuple):
    block: int
    """Columns at a time."""
    warps: int


class SumsTile(NamedTuple):
    rows: int
    columns: int
    warps: int


LOSS, LOSS_AND_GRADIENT = (
    Tunable(
        f"linear_cross_entropy.{name}",
        Tile,
        RowCase,
        {"block": (1024, 2048, BLOCK, 8192, 16384), "warps": (4, 8, WARPS, 32)},
    )
    for name in ("loss", "loss_and_gradient")
)
BIAS_GRADIENT = Tunable(
    "linear_cross_entropy.bias_gradient",
    SumsTile,
    RowCase,
    {"rows": (16, 32, BLOCK_ROWS, 128), "columns": (32, BLOCK_COLUMNS, 128, 256), "warps": (2, 4, 8)},
)


@triton.jit
def _tanh(x):
    """tanh in fp32, relative error about 2 units in the last place (Cephes' tanhf); NaN stays."""
    t = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(t, 10.0)) + 1.0)
    s = t * t
    small = -5.70498872745e-3 * s + 2.06390887954e-2
    small = small * s - 5.37397155531e-2
    small = small * s + 1.33314422036e-1
    small = small * s - 3.33332819422e-1
    small = small * s * t + t
    t = tl.where(t > 0.625, large, small)
    return tl.where(x < 0, -t, t)


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    """(softcap · tanh(x / softcap), its derivative), as Gemma 2 caps its logits; (x, 1) without a cap."""
    slope = 1.0
    if CAPPED:
        t = _tanh(tl.div_rn(x, softcap))
        x = softcap * t
        slope = 1.0 - t * t
    return x, slope


@triton.jit
def _cross_entropy(
    logits,  # (rows, V), row_stride apart
    labels,  # (rows,) int64
    bias,  # (V,) or None
    class_weight,  # (V,) fp32 or None
    mean_weight,  # scalar fp32, of class_weight; or None
    losses,  # (rows,) fp32
    scale,  # scalar fp32, or (rows,)
    vocab,
    row_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALE_BY_ROW: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)

    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if NEED_GRAD:
            zeros = tl.zeros([BLOCK], dtype=logits.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(logits + start + columns, zeros, mask=start + columns < vocab)
        return

    # Online logsumexp (Milakov and Gimelshein, arXiv 1805.02867), a running maximum and sum in every lane, which meet
    # once, after the loop. The maximum starts finite, so that a lane of -inf adds exp(-inf) = 0 and no NaN.
    lane_max = tl.full([BLOCK], -3.4e38, dtype=tl.float32)
    lane_sum = tl.zeros([BLOCK], dtype=tl.float32)
    lane_total = tl.zeros([BLOCK], dtype=tl.float32)  # of weight · score, for label smoothing
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        if bias is not None:
            x += tl.load(bias + start + columns, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            x, _ = _capped(x, softcap, CAPPED)
            x = tl.where(inside, x, float("-inf"))
        new_max = tl.maximum(lane_max, x)
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.exp(x - new_max)
        lane_max = new_max
        if SMOOTH:
            if class_weight is not None:
                x *= tl.load(class_weight + start + columns, mask=inside, other=1.0)
            lane_total += tl.where(inside, x, 0.0)
    valid = (label >= 0) & (label < vocab)
    y = tl.where(valid, label, 0)
    # Read before the sums below: past their barrier other warps write gradients over the row.
    target = tl.load(logits + y).to(tl.float32)
    if bias is not None:
        target += tl.load(bias + y).to(tl.float32)
    target, _ = _capped(target, softcap, CAPPED)
    of_label, mean, of_lse = 1.0, 1.0, 1.0
    of_target = 1.0 - label_smoothing
    if class_weight is not None:
        of_label = tl.load(class_weight + y)
        mean = tl.load(mean_weight)
        of_target *= of_label
        of_lse = of_target + label_smoothing * mean
    row_max = tl.max(lane_max, axis=0)
    total = tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0)
    lse = row_max + tl.log(total)

    # The maximum is taken off before anything is added: logits of hundreds would cost the small terms their digits.
    if class_weight is None:
        loss = tl.log(total) - of_target * (target - row_max)
    else:
        loss = of_target * (tl.log(total) - (target - row_max)) + label_smoothing * mean * tl.log(total)
    loss += z_loss * of_label * lse * lse
    if SMOOTH:
        loss -= label_smoothing * (tl.sum(lane_total, axis=0) / vocab - mean * row_max)
    poison = tl.where(valid, 0.0, float("nan"))  # a label outside the vocabulary must not pass for a number
    tl.store(losses + row, loss + poison)

    if NEED_GRAD:
        factor = tl.load(scale + row if SCALE_BY_ROW else scale)
        of_p = factor * (of_lse + 2 * z_loss * of_label * lse) / total
        of_all = factor * (label_smoothing / vocab)
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            x = tl.load(logits + start + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if bias is not None:
                x += tl.load(bias + start + columns, mask=inside, other=0.0).to(tl.float32)
            x, slope = _capped(x, softcap, CAPPED)
            dx = of_p * tl.exp(x - row_max) + poison
            if class_weight is not None:
                dx -= of_all * tl.load(class_weight + start + columns, mask=inside, other=0.0)
            else:
                dx -= of_all
            dx = tl.where(start + columns == y, dx - factor * of_target, dx)
            if CAPPED:
                dx *= slope
            tl.store(logits + start + columns, narrow(dx, logits.dtype.element_ty), mask=inside)


@triton.jit
def _add_column_sums(
    x,  # (rows, V), row_stride apart
    sums,  # (V,) fp32, added to
    rows,
    vocab,
    row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    lanes = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = (start + lanes).to(tl.int64)
        inside = (row < rows)[:, None] & (columns < vocab)[None, :]
        total += tl.load(x + row[:, None] * row_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    old = tl.load(sums + columns, mask=columns < vocab, other=0.0)
    tl.store(sums + columns, old + tl.sum(total, axis=0), mask=columns < vocab)


def _case(logits: Tensor, bias: Tensor | None = None, objective: Objective | None = None) -> RowCase:
    rows, vocab = logits.shape
    options = objective or Objective()
    given = {
        "bias": bias is not None,
        "smoothed": options.label_smoothing != 0,
        "class weights": options.class_weight is not None,
        "capped": options.softcap is not None,
    }
    variant = ", ".join(name for name, present in given.items() if present)
    return RowCase(words(logits.dtype), next_power_of_2(vocab), bucket(rows), variant)


def _tile(logits: Tensor, bias: Tensor | None, objective: Objective, need_grad: bool) -> Tile:
    kernel = LOSS_AND_GRADIENT if need_grad else LOSS
    return kernel.tile(logits.device, Tile(BLOCK, WARPS), _case, logits, bias, objective)


def _cross_entropy_launch(
    tile: Tile,
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    losses: Tensor,
    scale: Tensor,
    objective: Objective,
    mean_weight: Tensor | None,
    need_grad: bool,
) -> Launch:
    ignore_index, label_smoothing, z_loss, class_weight, softcap = objective
    return Launch(
        _cross_entropy,
        (logits.shape[0],),
        {
            "logits": logits,
            "labels": labels.contiguous(),
            "bias": None if bias is None else bias.contiguous(),
            "class_weight": None if class_weight is None else class_weight.contiguous(),
            "mean_weight": mean_weight,
            "losses": losses,
            "scale": scale.contiguous(),
            "vocab": logits.shape[1],
            "row_stride": logits.stride(0),
            "ignore_index": ignore_index,
            "label_smoothing": float(label_smoothing),
            "z_loss": float(z_loss),
            "softcap": softcap,
        },
        {
            "SMOOTH": label_smoothing != 0,
            "CAPPED": softcap is not None,
            "SCALE_BY_ROW": scale.dim() > 0,
            "NEED_GRAD": need_grad,
            "BLOCK": tile.block,
        },
        num_warps=tile.warps,
        tile=tile,
    )


def _sums_tile(x: Tensor) -> SumsTile:
    return BIAS_GRADIENT.tile(x.device, SumsTile(BLOCK_ROWS, BLOCK_COLUMNS, 4), _case, x)


def _column_sums_launch(tile: SumsTile, x: Tensor, sums: Tensor) -> Launch:
    rows, vocab = x.shape
    return Launch(
        _add_column_sums,
        (triton.cdiv(vocab, tile.columns),),
        {"x": x, "sums": sums, "rows": rows, "vocab": vocab, "row_stride": x.stride(0)},
        {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns},
        num_warps=tile.warps,
        tile=tile,
    )


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
    """`reference.linear_cross_entropy.cross_entropy_`; dbias sums the gradient as it is stored, as torch's does."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0] == 0:
        return losses
    mean_weight = None if objective.class_weight is None else objective.class_weight.mean()
    tile = _tile(logits, bias, objective, need_grad)
    launch(_cross_entropy_launch, tile, logits, labels, bias, losses, scale, objective, mean_weight, need_grad)
    if need_grad and dbias is not None:
        launch(_column_sums_launch, _sums_tile(logits), logits, dbias)
    return losses

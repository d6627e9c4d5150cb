"""Losses of linear_cross_entropy from matrix products whose results never leave the chip (as in Apple's
ml-cross-entropy, arXiv 2411.09009): a program multiplies M rows of hidden by N rows of weight at a time and keeps, for
each of its rows, the running maximum and sum of exponentials, the label's score and the sum of all scores.

What it saves and what it costs, per logit, of hidden size d, on an H100 (3.35 TB/s, 989 TFLOP/s, of which streaming
kernels reach 88% and products 70%): the chunks of logits are written once and read once, 4 bytes or 1.4 ps. Where no
gradient is wanted that is saved, beside 2d FLOPs that both ways need: 5.9 ps at d = 2048, so the loss alone takes at
best 0.81 of the time, if this product is as fast as cuBLAS's. A gradient must form the tile again: 8d FLOPs in place
of 6d, so 5.9 ps more, to save the 1.4 (and at best 1.4 more, with dlogits formed as that product ends). This pays
below d = 940 and not at phi-1.5's 2048, so gradients of a mean or a sum are formed from chunks, always.

Nor is dlogits multiplied on the spot: a tile of 128 × 256 would add into 384 rows of 2048 fp32 sums, 6.3 MB read and
written for 0.27 GFLOP of products. These 43 FLOPs per byte are half of what the products' operands need, the atomic
additions have no fixed order, and ml-cross-entropy is fast since it leaves out tiles whose softmax is below 2^-12,
which changes the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.linear_cross_entropy import Objective, losses_of_statistics
from .attention_forward import dot
from .attention_tiles import architecture
from .common import Launch, fp32_precision, refuse_double
from .grid import split_program
from .launching import launch
from .softcap import capped
from .tiles import RowCase, Tunable, bucket, words

PROGRAMS = 1024
"""Programs that a launch aims at: several for each multiprocessor, as they do not end together."""


class Tile(NamedTuple):
    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int


TILES = {
    "sm_80": Tile(128, 128, 32, 8, 4),
    "sm_90": Tile(128, 128, 64, 8, 4),
    "sm_100": Tile(128, 128, 64, 8, 4),
    "gfx942": Tile(128, 128, 32, 8, 2),
}
"""16-bit tiles: 64 FLOPs for each byte of operands that a step moves from the L2 cache. 128 × 256 would be 85, and is
spilled by Triton 3.6."""
SINGLE = Tile(32, 64, 32, 4, 2)
"""fp32 is multiplied on the ordinary units."""
ON_CHIP = Tunable(
    "linear_cross_entropy.loss_on_chip",
    Tile,
    RowCase,
    {"M": (32, 64, 128), "N": (64, 128, 256), "K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
)


def tile(architecture: str, itemsize: int, width: int, objective: Objective) -> Tile:
    """Rows, columns and depth that a program multiplies at a time. Masks at the end of the width, smoothing, class
    weights and a softcap need registers: then there are half as many columns. On sm_100, half as many warps too: for
    8 the compiler keeps to 64 registers, and spills."""
    if itemsize == 4:
        return SINGLE
    usual = TILES[architecture]
    if is_simple(objective) and width % usual.K == 0:
        return usual
    return usual._replace(N=usual.N // 2, num_warps=4 if architecture == "sm_100" else usual.num_warps)


def is_simple(objective: Objective) -> bool:
    """Whether labels are not smoothed, and there are no class weights and no softcap, which need registers."""
    return not objective.label_smoothing and objective.class_weight is None and objective.softcap is None


def case_of(hidden: Tensor, objective: Objective) -> RowCase:
    rows, width = hidden.shape
    return RowCase(words(hidden.dtype), bucket(width), bucket(rows), "" if is_simple(objective) else "options")


@triton.jit
def _add_scores(
    x, first, top, sums, target, total, bias, label, class_weight, vocab, softcap,
    SMOOTH: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The running statistics of rows, with the products x of columns from `first` on."""
    column = first + tl.arange(0, x.shape[1])
    inside = column < vocab
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    x, _ = capped(x, softcap, CAPPED)
    target += tl.sum(tl.where(column[None, :] == label[:, None], x, 0.0), axis=1)
    if SMOOTH:
        weighted = x
        if class_weight is not None:
            weighted = x * tl.load(class_weight + column, mask=inside, other=0.0)[None, :]
        total += tl.sum(tl.where(inside[None, :], weighted, 0.0), axis=1)
    x = tl.where(inside[None, :], x, float("-inf"))
    new = tl.maximum(top, tl.max(x, axis=1))
    sums = sums * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
    return new, sums, target, total


@triton.jit
def _statistics(
    hidden,  # (rows, width), hidden_stride apart
    weight,  # (vocab, width), weight_stride apart
    bias,  # (vocab,) or None
    labels,  # (rows,) int64
    class_weight,  # (vocab,) fp32 or None
    statistics,  # (4, parts, rows) fp32: maximum, sum of exp(score - maximum), label's score, sum of weight · score
    rows,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    parts,
    blocks,
    softcap,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,  # width is a multiple of K
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One block of rows, and `blocks` blocks of the vocabulary. Programs that start together share the weight's."""
    block, part = split_program(parts)
    row = block * M + tl.arange(0, M)
    lane = tl.arange(0, K)
    # Rows and columns beyond the end are the last one again, so that loads need no mask.
    h = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_stride + lane[None, :]
    label = tl.load(labels + row, mask=row < rows, other=-1)
    label = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)

    top = tl.full([M], -3.4e38, dtype=tl.float32)
    sums = tl.zeros([M], dtype=tl.float32)
    target = tl.zeros([M], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    for begin in range(part * blocks * N, tl.minimum((part + 1) * blocks * N, vocab), N):
        known = tl.minimum(begin + tl.arange(0, N), vocab - 1)
        w = weight + known.to(tl.int64)[None, :] * weight_stride + lane[:, None]
        x = tl.zeros([M, N], dtype=tl.float32)
        for start in range(0, width, K):
            if WHOLE:
                a = tl.load(h + start)
                x = dot(a, tl.load(w + start), x, PRECISION)
            else:
                some = start + lane < width
                a = tl.load(h + start, mask=some[None, :], other=0.0)
                x = dot(a, tl.load(w + start, mask=some[:, None], other=0.0), x, PRECISION)
        halves = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            first = begin + half * (N // 2)
            top, sums, target, total = _add_scores(
                halves[half], first, top, sums, target, total, bias, label, class_weight, vocab, softcap, SMOOTH, CAPPED
            )

    each = parts.to(tl.int64) * rows
    out = statistics + part.to(tl.int64) * rows + row
    tl.store(out, top, mask=row < rows)
    tl.store(out + each, sums, mask=row < rows)
    tl.store(out + 2 * each, target, mask=row < rows)
    tl.store(out + 3 * each, total, mask=row < rows)


def _parts(rows: int, vocab: int, tile: Tile) -> tuple[int, int]:
    """(parts of the vocabulary, blocks of N columns in each): about `PROGRAMS` programs, none without a block."""
    columns = triton.cdiv(vocab, tile.N)
    blocks = triton.cdiv(columns, min(columns, triton.cdiv(PROGRAMS, triton.cdiv(rows, tile.M))))
    return triton.cdiv(columns, blocks), blocks


def _statistics_launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    objective: Objective,
    blocks: int,
    precision: str,
    tile: Tile,
) -> Launch:
    (rows, width), vocab, parts = hidden.shape, weight.shape[0], statistics.shape[1]
    return Launch(
        _statistics,
        (triton.cdiv(rows, tile.M) * parts,),
        {
            "hidden": hidden,
            "weight": weight,
            "bias": bias,
            "labels": labels,
            "class_weight": objective.class_weight,
            "statistics": statistics,
            "rows": rows,
            "vocab": vocab,
            "width": width,
            "hidden_stride": hidden.stride(0),
            "weight_stride": weight.stride(0),
            "parts": parts,
            "blocks": blocks,
            "softcap": objective.softcap,
        },
        {
            "SMOOTH": objective.label_smoothing != 0,
            "CAPPED": objective.softcap is not None,
            "WHOLE": width % tile.K == 0,
            "PRECISION": precision,
            **{name: getattr(tile, name) for name in ("M", "N", "K")},
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tile=tile,
    )


def linear_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, objective: Objective) -> Tensor:
    """See `reference.linear_cross_entropy.linear_losses`."""
    refuse_double("linear_cross_entropy", hidden)
    rows, vocab = hidden.shape[0], weight.shape[0]
    if rows == 0:
        return hidden.new_empty(0, dtype=torch.float32)
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    bias = None if bias is None else bias.contiguous()
    if objective.class_weight is not None:
        objective = objective._replace(class_weight=objective.class_weight.contiguous())
    by_hand = tile(architecture(hidden.device), hidden.itemsize, hidden.shape[1], objective)
    shape = ON_CHIP.tile(hidden.device, by_hand, case_of, hidden, objective)
    parts, blocks = _parts(rows, vocab, shape)
    statistics = hidden.new_empty(4, parts, rows, dtype=torch.float32)
    given = hidden, weight, bias, labels.contiguous(), statistics, objective, blocks, fp32_precision(), shape
    launch(_statistics_launch, *given)
    tops, sums, targets, totals = statistics
    top = tops.amax(0)
    total = (sums * (tops - top).exp()).sum(0)
    mean = totals.sum(0) / vocab
    return losses_of_statistics(top, total, targets.sum(0), mean, labels, vocab, objective)

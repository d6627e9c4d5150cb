"""Cross entropy of a chunk of logits in Triton: a program per row, gradient in place, and column sums for the bias.

Of a row z of logits with label t:

    lse = m + log Σ_j exp(z_j - m), m = max_j z_j;  loss = lse - z_t;  dz_j = exp(z_j - lse) - [j = t];  db = Σ_rows dz

Bytes per element of the chunk (16-bit): 2 read and, with the gradient, 2 written: the row stays in the program's
registers until its sum is known (`blocks_held`). A row that does not fit is read twice, and the second read comes from
the L2 cache where that holds all rows in flight: three or four 512-thread programs for each of a GPU's multiprocessors.
The bias gradient reads the chunk once more: 2.
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
from .attention_tiles import architecture
from .common import Launch, next_power_of_2
from .launching import launch
from .linear_cross_entropy_on_chip import is_simple, linear_losses  # noqa: F401
from .rounding import narrow
from .softcap import capped
from .tiles import RowCase, Tunable, bucket, words

BLOCK = 4096  # columns at a time: with 512 threads, 8 each
GROUP = 8  # columns of a block that one thread has: they share a running maximum
WARPS = 16
MOST_HELD = {"sm_80": 8 * BLOCK, "sm_90": 13 * BLOCK, "sm_100": 13 * BLOCK, "gfx942": 8 * BLOCK}
"""Columns of a row that `WARPS` warps hold in registers. A block is 8 elements of 16 bits in each thread, 4 registers
of the 128 that a thread of 512 may have; scores, exponentials and addresses take the rest (docs/codegen.md). More are
spilled: on sm_80, which converts bf16 in several instructions, and by the compiler for AMD."""
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


def blocks_held(
    vocab: int,
    itemsize: int,
    objective: Objective,
    architecture: str,
    tile: Tile | None = None,
    *,
    need_grad: bool,
) -> int:
    """Return the blocks of a row if a program holds all of them in registers, or 0 where it reads the row twice: in
    fp32, for more columns than `MOST_HELD`, and with smoothed labels, class weights or a softcap, which need the
    registers. Fewer warps hold as many columns each; 32 have half the registers, and hold none. Without a gradient no
    row is read a second time, and none is held."""
    tile = tile or Tile(BLOCK, WARPS)
    fits = tile.warps <= WARPS and vocab <= MOST_HELD[architecture] * tile.warps // WARPS
    return triton.cdiv(vocab, tile.block) if need_grad and is_simple(objective) and itemsize == 2 and fits else 0


@triton.jit
def _scores(x, bias, lanes, start, inside, softcap, CAPPED: tl.constexpr):
    """(the scores in fp32 of logits x in columns start + lanes, their derivative by x); -inf outside of the vocabulary.

    Addresses are `pointer + lanes + start`: so the compiler keeps one per tensor, and the blocks' starts are offsets in
    the instructions.
    """
    x = x.to(tl.float32)
    if bias is not None:
        x += tl.load(bias + lanes + start, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    x, slope = capped(x, softcap, CAPPED)
    if CAPPED:
        x = tl.where(inside, x, float("-inf"))
    return x, slope


@triton.jit
def _weighted(x, class_weight, columns, inside):
    """class weight · score, 0 outside of the vocabulary."""
    if class_weight is not None:
        x *= tl.load(class_weight + columns, mask=inside, other=1.0)
    return tl.where(inside, x, 0.0)


@triton.jit
def _add_block(top, sums, totals, x, class_weight, columns, inside, SMOOTH: tl.constexpr):
    """Each group's running maximum, sum of exp(x - maximum) and, to smooth labels, of weight · score."""
    new = tl.maximum(top, tl.max(x, axis=1))
    sums = sums * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
    if SMOOTH:
        totals += tl.sum(_weighted(x, class_weight, columns, inside), axis=1)
    return new, sums, totals


@triton.jit
def _gradient(x, slope, class_weight, columns, inside, y, row_max, of_p, of_all, of_y, poison):
    """The gradient by the logits whose scores are x."""
    dx = of_p * tl.exp(x - row_max) + poison
    if class_weight is not None:
        dx -= of_all * tl.load(class_weight + columns, mask=inside, other=0.0)
    else:
        dx -= of_all
    return tl.where(columns == y, dx - of_y, dx) * slope


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
    nothing,  # 0, which the compiler must not know
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALE_BY_ROW: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    HELD: tl.constexpr,  # blocks of a row, all of which stay in registers; 0: the row is read twice
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if NEED_GRAD:
            zeros = tl.zeros([BLOCK // GROUP, GROUP], dtype=logits.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(logits + start + lanes, zeros, mask=start + lanes < vocab)
        return

    valid = (label >= 0) & (label < vocab)
    y = tl.where(valid, label, 0).to(tl.int32)
    # Read before the sums below: past their barrier other warps write gradients over the row.
    target = tl.load(logits + y).to(tl.float32)
    if bias is not None:
        target += tl.load(bias + y).to(tl.float32)
    target, _target_slope = capped(target, softcap, CAPPED)  # `_` is a block's, below

    # Online logsumexp (Milakov and Gimelshein, arXiv 1805.02867): a running maximum and sum for each group of columns
    # that one thread reads, which meet once, at the end. The maximum starts finite, so that a group of -inf adds
    # exp(-inf) = 0 and no NaN.
    top = tl.full([BLOCK // GROUP], -3.4e38, dtype=tl.float32)
    sums = tl.zeros([BLOCK // GROUP], dtype=tl.float32)
    totals = tl.zeros([BLOCK // GROUP], dtype=tl.float32)  # of weight · score, for label smoothing
    held = ()
    if HELD:
        for i in tl.static_range(HELD):
            columns = lanes + i * BLOCK
            inside = columns < vocab
            # Past the L1 cache, which then keeps the bias for the next row.
            held += (tl.load(logits + lanes + i * BLOCK, mask=inside, other=float("-inf"), cache_modifier=".cg"),)  # type: ignore[assignment]
            x, _ = _scores(held[i], bias, lanes, i * BLOCK, inside, softcap, CAPPED)
            top, sums, totals = _add_block(top, sums, totals, x, class_weight, columns, inside, SMOOTH)
    else:
        for start in range(0, vocab, BLOCK):
            columns = lanes + start
            inside = columns < vocab
            x = tl.load(logits + lanes + start, mask=inside, other=float("-inf"), eviction_policy="evict_last")
            x, _ = _scores(x, bias, lanes, start, inside, softcap, CAPPED)
            top, sums, totals = _add_block(top, sums, totals, x, class_weight, columns, inside, SMOOTH)
    row_max = tl.max(top, axis=0)
    total = tl.sum(sums * tl.exp(top - row_max), axis=0)
    lse = row_max + tl.log(total)

    of_label, mean, of_lse = 1.0, 1.0, 1.0
    of_target = 1.0 - label_smoothing
    if class_weight is not None:
        of_label = tl.load(class_weight + y)
        mean = tl.load(mean_weight)
        of_target *= of_label
        of_lse = of_target + label_smoothing * mean

    # The maximum is taken off before anything is added: logits of hundreds would cost the small terms their digits.
    if class_weight is None:
        loss = tl.log(total) - of_target * (target - row_max)
    else:
        loss = of_target * (tl.log(total) - (target - row_max)) + label_smoothing * mean * tl.log(total)
    loss += z_loss * of_label * lse * lse
    if SMOOTH:
        loss -= label_smoothing * (tl.sum(totals, axis=0) / vocab - mean * row_max)
    poison = tl.where(valid, 0.0, float("nan"))  # a label outside the vocabulary must not pass for a number
    tl.store(losses + row, loss + poison)

    if NEED_GRAD:
        factor = tl.load(scale + row if SCALE_BY_ROW else scale)
        of_p = factor * (of_lse + 2 * z_loss * of_label * lse) / total
        of_all = factor * (label_smoothing / vocab)
        of_y = factor * of_target
        if HELD:
            for i in tl.static_range(HELD):
                columns = lanes + i * BLOCK
                inside = columns < vocab
                # Unchanged, but the compiler cannot know: else it would keep the scores above, in fp32, in place of x.
                x = (held[i].to(tl.int16, bitcast=True) ^ nothing.to(tl.int16)).to(held[i].dtype, bitcast=True)
                x, slope = _scores(x, bias, lanes, i * BLOCK, inside, softcap, CAPPED)
                dx = _gradient(x, slope, class_weight, columns, inside, y, row_max, of_p, of_all, of_y, poison)
                tl.store(logits + lanes + i * BLOCK, narrow(dx, logits.dtype.element_ty), mask=inside)
        else:
            for start in range(0, vocab, BLOCK):
                columns = lanes + start
                inside = columns < vocab
                x = tl.load(logits + lanes + start, mask=inside, other=0.0, eviction_policy="evict_first")
                x, slope = _scores(x, bias, lanes, start, inside, softcap, CAPPED)
                dx = _gradient(x, slope, class_weight, columns, inside, y, row_max, of_p, of_all, of_y, poison)
                tl.store(logits + lanes + start, narrow(dx, logits.dtype.element_ty), mask=inside)


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
    chip = architecture(logits.device)
    held = blocks_held(logits.shape[1], logits.dtype.itemsize, objective, chip, tile, need_grad=need_grad)
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
            "nothing": 0,
        },
        {
            "SMOOTH": label_smoothing != 0,
            "CAPPED": softcap is not None,
            "SCALE_BY_ROW": scale.dim() > 0,
            "NEED_GRAD": need_grad,
            "HELD": held,
            "BLOCK": tile.block,
            "GROUP": GROUP,
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

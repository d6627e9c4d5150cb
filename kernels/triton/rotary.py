"""Rotary embedding in place in Triton: a program turns up to 64 heads of one token.

At position p, for each pair (a, b) of dims with frequency θ_i = base^(-2i / rotary_dim) (RoFormer, arXiv 2104.09864):

    a' = a cos(p θ_i) - b sin(p θ_i);  b' = b cos(p θ_i) + a sin(p θ_i); the gradient turns by -p θ_i

Bytes per element that turns: 2 × its size, read and written once; the dims past rotary_dim are not touched. The table's
rows (2 × rotary_dim bytes per token) come from the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, next_power_of_2, refuse_double
from .grid import split_program
from .launching import launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

HEADS = 64  # heads a program: with 16 pairs each and 128 threads, 8 elements of either half a thread


class Tile(NamedTuple):
    heads: int
    """Heads per program at most: a token may have fewer."""
    warps: int


KERNELS = {
    name: Tunable(f"rotary.{name}", Tile, RowCase, {"heads": (1, 2, 4, 8, 16, 32, HEADS), "warps": (1, 2, 4, 8)})
    for name in ("forward", "backward")
}


@triton.jit
def _rotate(
    x,  # (batch, sequence, heads, head_dim)
    cos,  # (max_positions, HALF)
    sin,  # (max_positions, HALF)
    positions,  # (batch, sequence), or None: row s takes position offset + s
    sequence,
    heads,
    offset,
    max_positions,
    batch_stride,
    row_stride,
    head_stride,
    positions_batch_stride,
    positions_row_stride,
    HALF: tl.constexpr,  # rotary_dim / 2
    PAIRS: tl.constexpr,  # HALF, padded to a power of two
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token, part = split_program(tl.cdiv(heads, HEADS))
    batch, row = token // sequence, token % sequence
    head = (part * HEADS + tl.arange(0, HEADS)).to(tl.int64)  # heads may lie a long sequence apart
    pair = tl.arange(0, PAIRS)
    if positions is None:
        position = offset + row
    else:
        position = tl.load(positions + batch * positions_batch_stride + row * positions_row_stride)
    # A position outside the table must not pass for a number: NaN.
    place = tl.zeros([PAIRS], dtype=tl.int64) + position
    known = (pair < HALF) & (place >= 0) & (place < max_positions)
    entry = place * HALF + pair
    c = tl.load(cos + entry, mask=known, other=float("nan")).to(tl.float32)[None, :]
    s = tl.load(sin + entry, mask=known, other=float("nan")).to(tl.float32)[None, :]
    if INVERSE:
        s = -s

    x += batch.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride
    if INTERLEAVED:
        dim = tl.arange(0, 2 * PAIRS)
        pointers = x + head[:, None] * head_stride + dim[None, :]
        inside = (head < heads)[:, None] & (dim < 2 * HALF)[None, :]
        a, b = tl.split(tl.reshape(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), (HEADS, PAIRS, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * PAIRS))
        tl.store(pointers, narrow(turned, x.dtype.element_ty), mask=inside)
    else:
        pointers = x + head[:, None] * head_stride + pair[None, :]
        inside = (head < heads)[:, None] & (pair < HALF)[None, :]
        a = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointers, narrow(a * c - b * s, x.dtype.element_ty), mask=inside)
        tl.store(pointers + HALF, narrow(b * c + a * s, x.dtype.element_ty), mask=inside)


def _case(x: Tensor, half: int, positions: int | Tensor, interleaved: bool) -> RowCase:
    batch, sequence, heads, _ = x.shape
    given = ["interleaved"] * interleaved + ["positions"] * isinstance(positions, Tensor)
    variant = ", ".join((f"{heads} heads", *given))
    return RowCase(words(x.dtype), next_power_of_2(half), bucket(batch * sequence), variant)


def _tile(x: Tensor, half: int, positions: int | Tensor, interleaved: bool, inverse: bool) -> Tile:
    block = min(HEADS, next_power_of_2(x.shape[2]))
    by_hand = Tile(block, max(1, min(4, block * next_power_of_2(half) // 256)))
    kernel = KERNELS["backward" if inverse else "forward"]
    return kernel.tile(x.device, by_hand, _case, x, half, positions, interleaved)


def _launch(
    tile: Tile, x: Tensor, cos: Tensor, sin: Tensor, positions: int | Tensor, interleaved: bool, inverse: bool
) -> Launch:
    batch, sequence, heads, _ = x.shape
    half = cos.shape[1]
    tensor = positions if isinstance(positions, Tensor) else None
    return Launch(
        _rotate,
        (triton.cdiv(heads, tile.heads) * batch * sequence,),
        {
            "x": x,
            "cos": cos,
            "sin": sin,
            "positions": tensor,
            "sequence": sequence,
            "heads": heads,
            "offset": positions if tensor is None else 0,
            "max_positions": cos.shape[0],
            "batch_stride": x.stride(0),
            "row_stride": x.stride(1),
            "head_stride": x.stride(2),
            "positions_batch_stride": 0 if tensor is None else tensor.stride(0),
            "positions_row_stride": 0 if tensor is None else tensor.stride(1),
        },
        {
            "HALF": half,
            "PAIRS": next_power_of_2(half),
            "HEADS": tile.heads,
            "INTERLEAVED": interleaved,
            "INVERSE": inverse,
        },
        num_warps=tile.warps,
        tile=tile,
    )


def rotate_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: int | Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """Same contract as `reference.rotary.rotate_`; a position outside the table makes its row NaN. Raises TypeError for
    fp64."""
    refuse_double("rotary", x)
    if x.numel():
        tile = _tile(x, cos.shape[1], positions, interleaved, inverse)
        launch(_launch, tile, x, cos.contiguous(), sin.contiguous(), positions, interleaved, inverse)

"""Muon in Triton: the symmetric products of the Newton-Schulz iteration, of which one half is computed.

With n rows and k >= n columns, an iteration is A = X Xᵀ, B = b A + c A A, X = a X + B X: 2n²k + 2n³ + 2n²k FLOPs. A and
B are symmetric, so a program forms one tile on or below the diagonal and stores it and its mirror image, as flash-muon
and Dion do. Of T × T tiles it forms T (T + 1) / 2. B X is not symmetric: it is torch's product, as are momentum and
update.

FLOPs of an iteration at n = 2048 with tiles of 128, where T = 16 and 17/32 of a symmetric product remains: 51.5 becomes
35.4 G for k = 2048 (q, k, v, dense), and 154.6 becomes 114.4 G for k = 8192 (fc1, fc2), so 0.69 and 0.74 of all. What
that is in time was not measured on a GPU. There are 136 programs, of which an H100 runs 132 at once if each fills a
multiprocessor, hence smaller tiles among those tried.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference import muon as reference
from ..reference.muon import momentum_, update_  # noqa: F401
from .attention_forward import dot
from .attention_tiles import architecture
from .common import Launch, fp32_precision, refuse_double
from .launching import launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words


class Tile(NamedTuple):
    M: int
    """Rows and columns of the product."""
    K: int
    num_warps: int
    num_stages: int


TILES = {
    "sm_80": Tile(128, 32, 8, 4),
    "sm_90": Tile(128, 64, 8, 4),
    "sm_100": Tile(128, 64, 8, 4),
    "gfx942": Tile(128, 32, 8, 2),
}
SINGLE = Tile(64, 32, 4, 2)
"""fp32 is multiplied on the ordinary units."""
SYMMETRIC = Tunable(
    "muon.symmetric_product",
    Tile,
    RowCase,
    {"M": (32, 64, 128), "K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
)


def case_of(x: Tensor, added: Tensor | None) -> RowCase:
    rows, width = x.shape
    return RowCase(words(x.dtype), bucket(width), bucket(rows), "" if added is None else "added")


@triton.jit
def _lower_tile(tiles):
    """(i, j) of this program, i >= j: rows of tiles r and T - 1 - r (T odd: r - 1) have T + 1 (T) tiles together."""
    odd = tiles % 2
    together = tiles + 1 - odd
    r = tl.program_id(0) // together
    c = tl.program_id(0) - r * together
    long = c < tiles - r
    i = tl.where(long, tiles - 1 - r, r - odd)
    return i, tl.where(long, c, c - (tiles - r))


@triton.jit
def _symmetric(
    x,  # (rows, width), row_stride apart
    added,  # (rows, rows), symmetric, or None
    out,  # (rows, rows)
    rows,
    width,
    row_stride,
    alpha,
    beta,
    WHOLE: tl.constexpr,  # width is a multiple of K
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """out = beta · added + alpha · x xᵀ: one tile (i, j) with i >= j, and its mirror image."""
    i, j = _lower_tile(tl.cdiv(rows, M))
    row = i * M + tl.arange(0, M)
    column = j * M + tl.arange(0, M)
    lane = tl.arange(0, K)
    # Rows beyond the end are the last one again, so that loads need no mask.
    a = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * row_stride + lane[None, :]
    b = x + tl.minimum(column, rows - 1).to(tl.int64)[None, :] * row_stride + lane[:, None]
    c = tl.zeros([M, M], dtype=tl.float32)
    for start in range(0, width, K):
        if WHOLE:
            c = dot(tl.load(a + start), tl.load(b + start), c, PRECISION)
        else:
            some = start + lane < width
            left = tl.load(a + start, mask=some[None, :], other=0.0)
            c = dot(left, tl.load(b + start, mask=some[:, None], other=0.0), c, PRECISION)
    c *= alpha
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    place = row.to(tl.int64)[:, None] * rows + column[None, :]
    if added is not None:
        c += beta * tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    if i == j:  # the hardware may add the terms of (r, c) and (c, r) in different orders
        c = tl.where(row[:, None] >= column[None, :], c, tl.trans(c))
    result = narrow(c, out.dtype.element_ty)
    tl.store(out + place, result, mask=inside)
    if i != j:
        mirrored = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(out + mirrored, tl.trans(result), mask=(column < rows)[:, None] & (row < rows)[None, :])


def _symmetric_launch(
    tile: Tile, x: Tensor, added: Tensor | None, out: Tensor, alpha: float, beta: float, precision: str
) -> Launch:
    rows, width = x.shape
    tiles = triton.cdiv(rows, tile.M)
    return Launch(
        _symmetric,
        (tiles * (tiles + 1) // 2,),
        {
            "x": x,
            "added": added,
            "out": out,
            "rows": rows,
            "width": width,
            "row_stride": x.stride(0),
            "alpha": alpha,
            "beta": beta,
        },
        {"WHOLE": width % tile.K == 0, "PRECISION": precision, "M": tile.M, "K": tile.K},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tile=tile,
    )


def symmetric_product(x: Tensor, added: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """beta · added + alpha · x xᵀ of x (n, k) and a symmetric, contiguous `added` (n, n): a new (n, n) in x's dtype.

    Summed in fp32 and rounded once. Element (i, j) has the bits of (j, i), and every call gives the same. An x whose
    rows are not contiguous is copied first: of the iterations of a matrix with more rows than columns, the first.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(x.shape[0], x.shape[0])
    by_hand = SINGLE if x.itemsize == 4 else TILES[architecture(x.device)]
    tile = SYMMETRIC.tile(x.device, by_hand, case_of, x, added)
    launch(_symmetric_launch, tile, x, added, out, float(alpha), float(beta), fp32_precision())
    return out


def polynomial(x: Tensor, b: float, c: float) -> Tensor:
    """See `reference.muon.polynomial`."""
    gram = symmetric_product(x)
    return symmetric_product(gram, gram, alpha=c, beta=b)


def orthogonalize(matrix: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """See `reference.muon.orthogonalize`. Raises TypeError for fp64."""
    refuse_double("muon", matrix)
    return reference.orthogonalize(matrix, steps, coefficients, eps, polynomial)

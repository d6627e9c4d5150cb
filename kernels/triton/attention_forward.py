"""The forward kernel of attention (FlashAttention-2, arXiv 2307.08691), and the pieces it shares with the backward's.

    S = τ Q Kᵀ;  LSE_i = log Σ_j exp(S_ij);  P = exp(S - LSE);  O = P V

over blocks of keys, with m the running maximum of a row, l its running sum: of a new block with maximum m',
O = O exp(m - m') + exp(S - m') V and l = l exp(m - m') + Σ_j exp(S_j - m'), and O / l at the end.

Online softmax in base 2: exp(x) = exp2(x log2(e)), and log2(e) is folded into the scale. The row's maximum is
subtracted from the raw score before the scale multiplies: near the maximum that difference is exact, and a row that
sees one key returns its value unchanged. Fused into score * scale - maximum, which is one instruction less per score,
the maximum's own probability would be 1 plus the rounding of maximum * scale: 0.5% once scores reach 1e5. The backward
does fuse them, since its log-sum-exp has such a rounding already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import split_program
from .rounding import INTERPRETED, narrow


@triton.jit
def document_of(row, cu_seqlens, documents, search_steps, sequence):
    """(first row, last row + 1) of the document that `row`, a scalar or a vector, lies in: a binary search."""
    row = tl.minimum(row, sequence - 1)
    low = row * 0
    high = low + documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens + middle) <= row
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return tl.load(cu_seqlens + low), tl.load(cu_seqlens + low + 1)


@triton.jit
def rotate(
    x, rows, cos, sin, cu_seqlens, documents, search_steps, sequence,
    INVERSE: tl.constexpr, VARLEN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x (M, WIDTH), its first 2 HALF columns turned in half-split pairs by each row's place in its document, in fp32.

    The columns are split as (WIDTH / (2 HALF), 2, HALF). Of these groups only the first turns: in the others cos is 1
    and sin is 0.
    """
    M: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // (2 * HALF)
    positions = rows
    if VARLEN:
        first, _ = document_of(rows, cu_seqlens, documents, search_steps, sequence)
        positions = rows - first
    group = tl.arange(0, GROUPS)[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    turning = (group == 0) & (rows < sequence)[:, None, None]  # (M, GROUPS, 1)
    at = positions[:, None, None] * HALF + column + group * 0
    c = tl.load(cos + at, mask=turning, other=1.0).to(tl.float32)  # (M, GROUPS, HALF)
    s = tl.load(sin + at, mask=turning, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    a, b = tl.split(tl.permute(tl.reshape(x.to(tl.float32), (M, GROUPS, 2, HALF)), (0, 1, 3, 2)))
    turned = tl.join(a * c - b * s, b * c + a * s)  # (M, GROUPS, HALF, 2)
    return narrow(tl.reshape(tl.permute(turned, (0, 1, 3, 2)), (M, GROUPS * 2 * HALF)), x.dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in fp32. Triton's interpreter would multiply bf16's bits as integers: there it is widened.

    fp32's products run on ordinary units, which add one term after another. The products of a tile are summed apart, or
    a key's gradient would be one chain over the rows of all its query heads, with three times plain PyTorch's error.
    Triton would join the sums again, but for the limit on inexact sums, which means nothing to these units.
    """
    APART: tl.constexpr = a.dtype == tl.float32 and PRECISION == "ieee"
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if APART:
        product = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
        return accumulator + product
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def visible(
    rows, columns, first, last, keys, least, most, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, BANDED: tl.constexpr
):
    """True where a row may see a column: all broadcast against each other; first, last bound the row's document."""
    if BANDED:
        seen = (columns - rows >= least) & (columns - rows <= most) & (columns < keys)
        if VARLEN:
            seen = seen & (columns < last)
    elif CAUSAL:  # rows that are stored are < sequence, so the columns they see are too
        seen = columns <= rows
    elif VARLEN:
        seen = columns < last
    else:
        seen = columns < keys
    if VARLEN:
        seen = seen & (columns >= first)
    return seen


@triton.jit
def inside(rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Mask of a tile's elements that exist, where `rows` (ROWS, 1) says which rows do: of WIDTH columns, D do. After
    them lies the next head, or the tensor's end."""
    if D < WIDTH:
        rows = rows & (tl.arange(0, WIDTH) < D)[None, :]
    return rows


@triton.jit
def rows_of(
    pointer, batch, head, stride_b, stride_s, stride_h,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The tile that load_rows moves: pointers (ROWS, WIDTH) to a head's first rows, or the tensor's descriptor."""
    if DESCRIPTORS:
        tile = pointer
    else:
        tile = pointer + batch * stride_b + head * stride_h
        tile += tl.arange(0, ROWS)[:, None] * stride_s + tl.arange(0, WIDTH)[None, :]
    return tile


@triton.jit
def load_rows(
    tile, batch, head, member, row, end, stride_s, stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(ROWS, WIDTH): rows of head `head` + member from `row` on. Rows from `end` on and columns from D on are 0.

    With DESCRIPTORS the tensor memory accelerator of Hopper and later fetches the tile: it computes the addresses, so
    that no thread holds a pointer, and gives 0 outside of the tensor, which ends at `end` and D. It writes shared
    memory through the path that the tensor cores read by; after a thread's copy each product needs a fence first.
    """
    if DESCRIPTORS:
        x = tile.load([tl.cast(batch, tl.int32), row, tl.cast(head, tl.int32) + member, 0])
        x = tl.reshape(x, (ROWS, WIDTH))
    else:
        # sequence * stride passes 2**31 in long packed buffers
        at = tile + tl.cast(row, tl.int64) * stride_s + tl.cast(member, tl.int64) * stride_h
        if MASKED:
            x = tl.load(at, mask=inside((row + tl.arange(0, ROWS) < end)[:, None], D, WIDTH), other=0.0)
        elif D < WIDTH:
            x = tl.load(at, mask=(tl.arange(0, WIDTH) < D)[None, :], other=0.0)
        else:
            x = tl.load(at)
    return x


@triton.jit
def _attend(
    accumulator, total, maximum, q, k_tile, v_tile, batch, key_head, stride_k, stride_v, start, end,
    rows, first, last, cos, sin, cu_seqlens, documents, search_steps, keys, least, most, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, BANDED: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Folds the keys start..end into accumulator (M, WIDTH), total (M,) and maximum (M,), the last before the scale."""
    M: tl.constexpr = q.shape[0]
    WIDTH: tl.constexpr = q.shape[1]
    for n in range(start, end, N):
        columns = n + tl.arange(0, N)
        k = load_rows(k_tile, batch, key_head, 0, n, keys, stride_k, 0, N, D, WIDTH, MASKED, DESCRIPTORS)  # (N, WIDTH)
        v = load_rows(v_tile, batch, key_head, 0, n, keys, stride_v, 0, N, D, WIDTH, MASKED, DESCRIPTORS)
        if HALF > 0:
            k = rotate(k, columns, cos, sin, cu_seqlens, documents, search_steps, keys, False, VARLEN, HALF)
        scores = dot(q, tl.trans(k), tl.zeros((M, N), tl.float32), PRECISION)
        if MASKED:
            seen = visible(rows[:, None], columns[None, :], first, last, keys, least, most, CAUSAL, VARLEN, BANDED)
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # Where nothing was seen yet the maximum is -inf, and -inf - -inf is NaN: any finite number does.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        p = tl.exp2((scores - base[:, None]) * scale_log2)
        shrink = tl.exp2((maximum - base) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        accumulator = dot(narrow(p, v.dtype), v, accumulator * shrink[:, None], PRECISION)
        maximum = new_maximum
    return accumulator, total, maximum


@triton.jit
def forward_kernel(
    q_pointer, k_pointer, v_pointer, cos, sin, cu_seqlens,
    out_pointer,  # (batch, sequence, heads, D) by stride
    lse_pointer,  # (batch, heads, sequence) fp32, natural logarithm
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_v_b, stride_v_s, stride_v_h, stride_out_b, stride_out_s, stride_out_h,
    heads, sequence, keys, least, most, documents, search_steps, scale, scale_log2,
    GROUP: tl.constexpr,  # query heads a key head
    D: tl.constexpr,  # head_dim
    WIDTH: tl.constexpr,  # columns of a tile, of which the first D exist: a power of two
    HALF: tl.constexpr,  # rotary_dim / 2, 0: no rotation
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
    BANDED: tl.constexpr,  # row i sees key j where least <= j - i <= most; else keys = sequence
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # k and v are tensor descriptors of blocks (1, N, 1, WIDTH)
):  # fmt: skip
    """One program: M rows of one query head against all keys they see. Grid (row blocks * batch * heads,)."""
    blocks = tl.cdiv(sequence, M)
    batch_head, block = split_program(blocks)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)  # heads may lie a long sequence apart
    if not BANDED:
        keys = sequence
    # The last rows see the most keys: they start first, so that no long program is left for the end.
    block_start = (blocks - 1 - block) * M
    rows = block_start + tl.arange(0, M)
    dims = tl.arange(0, WIDTH)
    row_start = tl.cast(block_start, tl.int64)

    q_tile = q_pointer + batch * stride_q_b + head * stride_q_h + row_start * stride_q_s
    q_tile += tl.arange(0, M)[:, None] * stride_q_s + dims[None, :]
    key_head = head // GROUP
    k_tile = rows_of(k_pointer, batch, key_head, stride_k_b, stride_k_s, stride_k_h, N, WIDTH, DESCRIPTORS)
    v_tile = rows_of(v_pointer, batch, key_head, stride_v_b, stride_v_s, stride_v_h, N, WIDTH, DESCRIPTORS)

    q = tl.load(q_tile, mask=inside((rows < sequence)[:, None], D, WIDTH), other=0.0)
    if HALF > 0:
        q = rotate(
            q, rows + (keys - sequence), cos, sin, cu_seqlens, documents, search_steps, keys, False, VARLEN, HALF
        )  # fmt: skip

    start = 0
    end = keys
    first = rows[:, None]
    last = rows[:, None]
    if VARLEN:
        start, _ = document_of(block_start, cu_seqlens, documents, search_steps, sequence)
        _, end = document_of(block_start + M - 1, cu_seqlens, documents, search_steps, sequence)
        first, last = document_of(rows, cu_seqlens, documents, search_steps, sequence)
        first = first[:, None]
        last = last[:, None]
    if CAUSAL:
        end = tl.minimum(sequence, block_start + M)
    if BANDED:  # only the blocks that some row sees
        start = tl.maximum(start, block_start + least)
        end = tl.minimum(end, block_start + M + most)

    total = tl.zeros((M,), tl.float32)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    accumulator = tl.zeros((M, WIDTH), tl.float32)
    # Blocks that every row sees whole need no mask, which takes a loop of their own. That pays where there are many and
    # the second loop is no burden: beside the rotation it costs up to 100 registers, and where only the last block has
    # keys to hide, ptxas waits for each of sm_90's products in both loops.
    if CAUSAL and not VARLEN and HALF == 0:
        masked_start = block_start // N * N
        accumulator, total, maximum = _attend(
            accumulator, total, maximum, q, k_tile, v_tile, batch, key_head, stride_k_s, stride_v_s,
            start, masked_start,
            rows, first, last, cos, sin, cu_seqlens, documents, search_steps, keys, least, most, scale_log2,
            False, CAUSAL, VARLEN, BANDED, D, HALF, N, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        start = masked_start
    accumulator, total, maximum = _attend(
        accumulator, total, maximum, q, k_tile, v_tile, batch, key_head, stride_k_s, stride_v_s, start, end,
        rows, first, last, cos, sin, cu_seqlens, documents, search_steps, keys, least, most, scale_log2,
        True, CAUSAL, VARLEN, BANDED, D, HALF, N, PRECISION, DESCRIPTORS,
    )  # fmt: skip

    LN2: tl.constexpr = 0.6931471805599453
    lse_row = lse_pointer + batch_head.to(tl.int64) * sequence
    tl.store(lse_row + rows, maximum * scale + tl.log2(total) * LN2, mask=rows < sequence)
    out_tile = out_pointer + batch * stride_out_b + head * stride_out_h + row_start * stride_out_s
    out_tile += tl.arange(0, M)[:, None] * stride_out_s + dims[None, :]
    out = accumulator / total[:, None]
    if BANDED:  # a row that sees no key: 0, where 0 / 0 is NaN
        out = tl.where((rows + most >= 0)[:, None], out, 0.0)
    stored = inside((rows < sequence)[:, None], D, WIDTH)
    tl.store(out_tile, narrow(out, out_pointer.dtype.element_ty), mask=stored)

"""The backward kernels of attention: one for dq, one for dk and dv. Each gradient has one writer, and no atomics.

    D = rowsum(dO ∘ O);  dV = Pᵀ dO;  dP = dO Vᵀ;  dS = P ∘ (dP - D);  dQ = τ dS K;  dK = τ dSᵀ Q

Both form the probabilities again from the saved log-sum-exp. The dq kernel runs first: it has dout and out in hand and
leaves delta = rowsum(dout * out) for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_forward import document_of, dot, inside, load_rows, rotate, rows_of, visible
from .grid import split_program
from .rounding import fma, narrow

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _probabilities(scores, lse, scale, scale_log2, DTYPE: tl.constexpr):
    """exp(scale * scores - lse) in fp32, lse broadcast: one multiply-add for 16-bit tensors. For fp32 tensors log2(e)
    multiplies the difference, because log2(e) * lse is rounded once more, which fp32 gradients would show."""
    exponents = fma(scores, scale, -lse) * LOG2_E if tl.float32 == DTYPE else fma(scores, scale_log2, -lse * LOG2_E)
    return tl.exp2(exponents)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_tile, v_tile, batch, key_head, stride_k, stride_v, start, end,
    rows, first, last, cos, sin, cu_seqlens, documents, search_steps, keys, least, most, scale, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, BANDED: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dq (M, WIDTH), without the scale, plus what the keys start..end give it."""
    M: tl.constexpr = q.shape[0]
    WIDTH: tl.constexpr = q.shape[1]
    for n in range(start, end, N):
        columns = n + tl.arange(0, N)
        k = load_rows(k_tile, batch, key_head, 0, n, keys, stride_k, 0, N, D, WIDTH, MASKED, DESCRIPTORS)  # (N, WIDTH)
        v = load_rows(v_tile, batch, key_head, 0, n, keys, stride_v, 0, N, D, WIDTH, MASKED, DESCRIPTORS)
        if HALF > 0:
            k = rotate(k, columns, cos, sin, cu_seqlens, documents, search_steps, keys, False, VARLEN, HALF)
        scores = dot(q, tl.trans(k), tl.zeros((M, N), tl.float32), PRECISION)
        p = _probabilities(scores, lse[:, None], scale, scale_log2, k.dtype)
        dp = dot(dout, tl.trans(v), tl.zeros((M, N), tl.float32), PRECISION)
        dscores = p * (dp - delta[:, None])
        if MASKED:
            seen = visible(rows[:, None], columns[None, :], first, last, keys, least, most, CAUSAL, VARLEN, BANDED)
            dscores = tl.where(seen, dscores, 0.0)
        dq = dot(narrow(dscores, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def dq_kernel(
    dout_pointer, q_pointer, k_pointer, v_pointer, out_pointer, lse_pointer, cos, sin, cu_seqlens,
    delta_pointer,  # (batch, heads, sequence) fp32
    dq_pointer,  # (batch, sequence, heads, D) by stride
    stride_dout_b, stride_dout_s, stride_dout_h, stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_v_b, stride_v_s, stride_v_h, stride_out_b, stride_out_s, stride_out_h, stride_dq_b, stride_dq_s, stride_dq_h,
    heads, sequence, keys, least, most, documents, search_steps, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr, BANDED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program: dq of M rows of one query head, and their delta. Grid (row blocks * batch * heads,)."""
    blocks = tl.cdiv(sequence, M)
    batch_head, block = split_program(blocks)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)  # heads may lie a long sequence apart
    if not BANDED:
        keys = sequence
    block_start = (blocks - 1 - block) * M  # longest programs first
    rows = block_start + tl.arange(0, M)
    stored = inside((rows < sequence)[:, None], D, WIDTH)
    local = tl.arange(0, M)[:, None]
    dims = tl.arange(0, WIDTH)[None, :]
    row_start = tl.cast(block_start, tl.int64)

    q_tile = q_pointer + batch * stride_q_b + head * stride_q_h + row_start * stride_q_s
    dout_tile = dout_pointer + batch * stride_dout_b + head * stride_dout_h + row_start * stride_dout_s
    out_tile = out_pointer + batch * stride_out_b + head * stride_out_h + row_start * stride_out_s
    key_head = head // GROUP
    k_tile = rows_of(k_pointer, batch, key_head, stride_k_b, stride_k_s, stride_k_h, N, WIDTH, DESCRIPTORS)
    v_tile = rows_of(v_pointer, batch, key_head, stride_v_b, stride_v_s, stride_v_h, N, WIDTH, DESCRIPTORS)

    dout = tl.load(dout_tile + local * stride_dout_s + dims, mask=stored, other=0.0)  # (M, WIDTH)
    out = tl.load(out_tile + local * stride_out_s + dims, mask=stored, other=0.0)
    statistics = batch_head.to(tl.int64) * sequence + rows
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_pointer + statistics, delta, mask=rows < sequence)
    lse = tl.load(lse_pointer + statistics, mask=rows < sequence, other=float("inf"))
    q = tl.load(q_tile + local * stride_q_s + dims, mask=stored, other=0.0)
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

    dq = tl.zeros((M, WIDTH), tl.float32)
    if CAUSAL and not VARLEN and HALF == 0:  # as in the forward kernel
        masked_start = block_start // N * N
        dq = _add_dq(
            dq, q, dout, lse, delta, k_tile, v_tile, batch, key_head, stride_k_s, stride_v_s, start, masked_start,
            rows, first, last, cos, sin, cu_seqlens, documents, search_steps, keys, least, most, scale, scale_log2,
            False, CAUSAL, VARLEN, BANDED, D, HALF, N, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        start = masked_start
    dq = _add_dq(
        dq, q, dout, lse, delta, k_tile, v_tile, batch, key_head, stride_k_s, stride_v_s, start, end,
        rows, first, last, cos, sin, cu_seqlens, documents, search_steps, keys, least, most, scale, scale_log2,
        True, CAUSAL, VARLEN, BANDED, D, HALF, N, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    dq *= scale
    if HALF > 0:
        dq = rotate(
            dq, rows + (keys - sequence), cos, sin, cu_seqlens, documents, search_steps, keys, True, VARLEN, HALF
        )  # fmt: skip
    dq_tile = dq_pointer + batch * stride_dq_b + head * stride_dq_h + row_start * stride_dq_s
    tl.store(dq_tile + local * stride_dq_s + dims, narrow(dq, dq_pointer.dtype.element_ty), mask=stored)


@triton.jit
def _add_dkv(
    dk, dv, k, v, q_tile, dout_tile, batch, head, lse_row, delta_row,
    stride_q_s, stride_q_h, stride_dout_s, stride_dout_h, start, end, columns, first, last,
    cos, sin, cu_seqlens, documents, search_steps, sequence, keys, least, most, scale, scale_log2,
    GROUP: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, BANDED: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dk (N, WIDTH), without the scale, and dv (N, WIDTH) plus what the rows start..end of GROUP query heads give them.

    One loop over heads and rows: one inside the other takes up to 70 more registers.
    """
    N: tl.constexpr = k.shape[0]
    WIDTH: tl.constexpr = k.shape[1]
    steps = tl.cdiv(end - start, M)
    for i in range(GROUP * steps):
        member = i // steps if GROUP > 1 else 0
        m = start + (i - member * steps) * M
        rows = m + tl.arange(0, M)
        within = rows < sequence
        q = load_rows(q_tile, batch, head, member, m, sequence, stride_q_s, stride_q_h, M, D, WIDTH, True, DESCRIPTORS)
        dout = load_rows(
            dout_tile, batch, head, member, m, sequence, stride_dout_s, stride_dout_h, M, D, WIDTH, True, DESCRIPTORS
        )
        # Rows past the end give nothing: exp2(0 - inf) = 0.
        lse = tl.load(lse_row + member * sequence + rows, mask=within, other=float("inf"))
        delta = tl.load(delta_row + member * sequence + rows, mask=within, other=0.0)
        if HALF > 0:
            q = rotate(
                q, rows + (keys - sequence), cos, sin, cu_seqlens, documents, search_steps, keys, False, VARLEN, HALF
            )  # fmt: skip
        scores = dot(k, tl.trans(q), tl.zeros((N, M), tl.float32), PRECISION)
        p = _probabilities(scores, lse[None, :], scale, scale_log2, k.dtype)
        if MASKED:
            # first and last bound the column's document: the row's too, wherever one may see the other.
            if BANDED:
                seen = (columns - rows[None, :] >= least) & (columns - rows[None, :] <= most)
                if VARLEN:
                    seen = seen & (rows[None, :] >= first)
            else:
                seen = columns <= rows[None, :] if CAUSAL else rows[None, :] >= first
            if VARLEN:
                seen = seen & (rows[None, :] < last)
            p = tl.where(seen, p, 0.0)
        dv = dot(narrow(p, dout.dtype), dout, dv, PRECISION)
        dp = dot(v, tl.trans(dout), tl.zeros((N, M), tl.float32), PRECISION)
        dscores = p * (dp - delta[None, :])
        if MASKED:  # 0 * NaN is NaN, and hidden rows must not show
            dscores = tl.where(seen, dscores, 0.0)
        dk = dot(narrow(dscores, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    dout_pointer, q_pointer, k_pointer, v_pointer, lse_pointer, delta_pointer, cos, sin, cu_seqlens,
    dk_pointer, dv_pointer,  # (batch, sequence, key_heads, D) by stride
    stride_dout_b, stride_dout_s, stride_dout_h, stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_v_b, stride_v_s, stride_v_h, stride_dk_b, stride_dk_s, stride_dk_h, stride_dv_b, stride_dv_s, stride_dv_h,
    key_heads, sequence, keys, least, most, documents, search_steps, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr, BANDED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of N keys of one key head, over GROUP query heads. Grid (blocks * batch * key_heads,)."""
    if not BANDED:
        keys = sequence
    batch_head, block = split_program(tl.cdiv(keys, N))
    batch = (batch_head // key_heads).to(tl.int64)
    key_head = (batch_head % key_heads).to(tl.int64)
    block_start = block * N
    columns = block_start + tl.arange(0, N)
    stored = inside((columns < keys)[:, None], D, WIDTH)
    local = tl.arange(0, N)[:, None]
    dims = tl.arange(0, WIDTH)[None, :]
    column_start = tl.cast(block_start, tl.int64)

    k_tile = k_pointer + batch * stride_k_b + key_head * stride_k_h + column_start * stride_k_s
    v_tile = v_pointer + batch * stride_v_b + key_head * stride_v_h + column_start * stride_v_s
    k = tl.load(k_tile + local * stride_k_s + dims, mask=stored, other=0.0)  # (N, WIDTH)
    v = tl.load(v_tile + local * stride_v_s + dims, mask=stored, other=0.0)
    if HALF > 0:
        k = rotate(k, columns, cos, sin, cu_seqlens, documents, search_steps, keys, False, VARLEN, HALF)

    start = block_start if CAUSAL else 0
    end = sequence
    first = columns[:, None]
    last = columns[:, None]
    if VARLEN:
        first, last = document_of(columns, cu_seqlens, documents, search_steps, sequence)
        first = first[:, None]
        last = last[:, None]
        if not CAUSAL:
            start, _ = document_of(block_start, cu_seqlens, documents, search_steps, sequence)
        _, end = document_of(block_start + N - 1, cu_seqlens, documents, search_steps, sequence)

    if BANDED:  # only the rows that see some key of the block
        start = tl.maximum(start, block_start - most)
        end = tl.maximum(start, tl.minimum(end, block_start + N - least))

    dk = tl.zeros((N, WIDTH), tl.float32)
    dv = tl.zeros((N, WIDTH), tl.float32)
    head = key_head * GROUP
    q_tile = rows_of(q_pointer, batch, head, stride_q_b, stride_q_s, stride_q_h, M, WIDTH, DESCRIPTORS)
    dout_tile = rows_of(dout_pointer, batch, head, stride_dout_b, stride_dout_s, stride_dout_h, M, WIDTH, DESCRIPTORS)
    statistics = (batch * key_heads * GROUP + head) * sequence
    # One loop, masked throughout: a second one, without the mask, for the rows that see every key would take up to 40
    # more registers, and under Triton 3.6 wait for each product on sm_90.
    dk, dv = _add_dkv(
        dk, dv, k, v, q_tile, dout_tile, batch, head, lse_pointer + statistics, delta_pointer + statistics,
        stride_q_s, stride_q_h, stride_dout_s, stride_dout_h, start, end, columns[:, None], first, last,
        cos, sin, cu_seqlens, documents, search_steps, sequence, keys, least, most, scale, scale_log2,
        GROUP, CAUSAL or VARLEN or BANDED, CAUSAL, VARLEN, BANDED, D, HALF, M, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    dk *= scale
    if HALF > 0:
        dk = rotate(dk, columns, cos, sin, cu_seqlens, documents, search_steps, keys, True, VARLEN, HALF)
    dk_tile = dk_pointer + batch * stride_dk_b + key_head * stride_dk_h + column_start * stride_dk_s
    tl.store(dk_tile + local * stride_dk_s + dims, narrow(dk, dk_pointer.dtype.element_ty), mask=stored)
    dv_tile = dv_pointer + batch * stride_dv_b + key_head * stride_dv_h + column_start * stride_dv_s
    tl.store(dv_tile + local * stride_dv_s + dims, narrow(dv, dv_pointer.dtype.element_ty), mask=stored)

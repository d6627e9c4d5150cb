"""Attention in plain PyTorch, (sequence, sequence) scores and all: what every other back end is measured against.

The backward forms the probabilities again from the saved log-sum-exp, as FlashAttention does (arXiv 2205.14135).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import off


class AttentionOptions(NamedTuple):
    """What both passes of attention take beside their tensors."""

    scale: float
    causal: bool = True
    """A row sees its own key and those before it."""
    window: tuple[int, int] | None = None
    """(left, right): of these, only so many keys before and behind its own, -1 for all."""
    cu_seqlens: Tensor | None = None
    """(documents + 1,) int32 with batch 1 and as many keys as rows: rows see only their own document."""
    cos: Tensor | None = None
    sin: Tensor | None = None
    """(positions, rotary_dim / 2) fp32: q and k are rotated first, by the row's place in its document."""


@off
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ + mask) v -> (out, lse).

    q (batch, sequence, heads, head_dim), k and v (batch, keys, key_heads, head_dim), any strides. out as q; lse
    (batch, heads, sequence), natural logarithm, fp32 (fp64 for fp64). Rows are aligned with the last keys: row i stands
    at key i + keys - sequence, for the mask and for the rotation (which needs keys >= sequence). A row that sees no key
    gets out 0 and lse -inf.
    """
    check_documents(q.shape[1], options.cu_seqlens, options.cos)
    hidden = _hidden(q, k, options)
    scores = _scores(*_rotated(q, k, options), options.scale, hidden)  # (B, Hkv, G, S, keys)
    lse = scores.logsumexp(-1)  # (B, Hkv, G, S)
    values = _probabilities(scores, lse[..., None], hidden) @ _wide(v).movedim(1, 2)[:, :, None]
    result = values.flatten(1, 2).transpose(1, 2)  # (B, S, H, D)
    out = result.to(q.dtype) if out is None else out.copy_(result)
    return out, lse.flatten(1, 2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients of q, k and v (before the rotation, where one was asked for) into dq, dk and dv."""
    check_documents(q.shape[1], options.cu_seqlens, options.cos)
    key_heads = k.shape[2]
    rotated_q, rotated_k = _rotated(q, k, options)
    hidden = _hidden(q, k, options)
    scores = _scores(rotated_q, rotated_k, options.scale, hidden)
    probabilities = _probabilities(scores, _grouped(lse.transpose(1, 2)[..., None], key_heads), hidden)
    grouped_dout = _grouped(_wide(dout), key_heads)  # (B, Hkv, G, S, D)
    dv.copy_((probabilities.mT @ grouped_dout).sum(2).transpose(1, 2))
    dprobabilities = grouped_dout @ _wide(v).movedim(1, 2)[:, :, None].mT
    row_sums = (probabilities * dprobabilities).sum(-1, keepdim=True)
    dscores = probabilities.mul_(dprobabilities.sub_(row_sums)).mul_(options.scale)
    drotated_q = (dscores @ rotated_k.movedim(1, 2)[:, :, None]).flatten(1, 2).transpose(1, 2)
    drotated_k = (dscores.mT @ _grouped(rotated_q, key_heads)).sum(2).transpose(1, 2)
    q_positions, positions = row_positions(q, k, options.cu_seqlens)
    dq.copy_(rotate(drotated_q, options.cos, options.sin, q_positions, inverse=True))
    dk.copy_(rotate(drotated_k, options.cos, options.sin, positions, inverse=True))


def check_documents(length: int, cu_seqlens: Tensor | None, cos: Tensor | None) -> None:
    """Raise ValueError, naming the value, unless cu_seqlens rises from 0 to `length` and cos has a row for each
    position of the longest document (of the sequence, without documents). On a CPU; elsewhere the values are not read,
    which would wait for the device."""
    longest = length
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        for i, end in enumerate(ends):
            least, most = (ends[i - 1], length) if i else (0, 0)
            if not least <= end <= most or (i == len(ends) - 1 and end != length):
                raise ValueError(
                    f"cu_seqlens[{i}] is {end}; expected numbers that do not fall, from 0 to the sequence's {length}"
                )
        longest = max(end - start for start, end in itertools.pairwise(ends))
    if cos is not None and cos.shape[0] < longest:
        kind = "sequence" if cu_seqlens is None else "document"
        raise ValueError(f"cos and sin have {cos.shape[0]} positions for a {kind} of {longest}; make a longer table")


def document_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(length,) int64: each row's place in its document, or in the sequence where there are no documents."""
    rows = torch.arange(length, device=device)
    if cu_seqlens is None:
        return rows
    return rows - cu_seqlens.long()[_documents(length, cu_seqlens)]


def row_positions(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """`document_positions` of q's rows, which are aligned with the last keys, and of the keys."""
    positions = document_positions(k.shape[1], cu_seqlens, q.device)
    return positions[k.shape[1] - q.shape[1] :], positions  # rotary tables are refused where q is the longer


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, *, inverse: bool = False) -> Tensor:
    """Half-split rotary embedding of x (batch, sequence, heads, head_dim); x itself where cos or sin is None."""
    if cos is None or sin is None:
        return x
    half = cos.shape[1]
    c, s = (table[positions][:, None].to(x.dtype) for table in (cos, sin))  # (S, 1, half)
    s = -s if inverse else s
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rotated(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    q_positions, positions = row_positions(q, k, options.cu_seqlens)
    tables = options.cos, options.sin
    return rotate(_wide(q), *tables, q_positions), rotate(_wide(k), *tables, positions)


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """(B, S, H, D) -> (B, key_heads, H / key_heads, S, D): the query heads that share a key head, together."""
    return x.movedim(1, 2).unflatten(1, (key_heads, -1))


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    scores = (_grouped(q, k.shape[2]) @ k.movedim(1, 2)[:, :, None].mT).mul_(scale)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor, hidden: Tensor | None) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing, where that would be exp(-inf + inf)."""
    probabilities = (scores - lse).exp_()
    return probabilities if hidden is None else probabilities.masked_fill_(hidden.all(-1, keepdim=True), 0.0)


def band(sequence: int, keys: int, causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """(least, most): row i sees key j where least <= j - i <= most. Unbounded sides end where the scores do."""
    left, right = window or (-1, -1)
    right = 0 if causal else right
    own = keys - sequence  # rows are aligned with the last keys
    return (
        -sequence if left < 0 else max(own - left, -sequence),
        keys if right < 0 else min(own + right, keys),
    )


def _documents(length: int, cu_seqlens: Tensor) -> Tensor:
    """(length,) int64: the document of each row. Empty documents are passed over."""
    rows = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, rows, right=True) - 1


def _hidden(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor | None:
    """(sequence, keys) bool: True where the row may not see the key; None where every row sees all."""
    sequence, keys = q.shape[1], k.shape[1]
    least, most = band(sequence, keys, options.causal, options.window)
    hidden = None
    if least > 1 - sequence or most < keys - 1:
        ahead = torch.arange(keys, device=q.device) - torch.arange(sequence, device=q.device)[:, None]
        hidden = (ahead < least) | (ahead > most)
    if options.cu_seqlens is None:
        return hidden
    document = _documents(sequence, options.cu_seqlens)
    other = document[:, None] != document
    return other if hidden is None else hidden | other

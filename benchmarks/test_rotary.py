"""Rotary embedding of half of each head's dims, on q and k in a packed buffer, beside the peers' functions.

Bytes: half of q and k, read and written. Peers that write new tensors move twice as much, which makes them slower.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb

from benchmarks import sizes
from benchmarks.harness import Results
from benchmarks.ops import DTYPES, Cost, Op, leaf, measure
from benchmarks.peers import NOT_COMPILED, backends, compiled, peer
from benchmarks.subjects import Contender
from benchmarks.timing import device
from phi_fast.kernels import apply_rotary_, backend, rotary_table

pytestmark = pytest.mark.usefixtures("kept_memory")

HEAD_DIM, ROTARY_DIM = 64, 32


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split pairs; x (batch, sequence, heads, head_dim), cos and sin (sequence, 1, rotary_dim / 2)."""
    a, b, rest = x.split((ROTARY_DIM // 2, ROTARY_DIM // 2, HEAD_DIM - ROTARY_DIM), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def transformers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split, rotate and join q and k as PhiAttention does. cos and sin (1, sequence, rotary_dim)."""
    q, k = x.chunk(2, 2)
    rotated = apply_rotary_pos_emb(q[..., :ROTARY_DIM], k[..., :ROTARY_DIM], cos, sin, unsqueeze_dim=2)
    return torch.cat([torch.cat((r, y[..., ROTARY_DIM:]), -1) for r, y in zip(rotated, (q, k), strict=True)], 2)


def litgpt(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as litgpt's CausalSelfAttention does, on (batch, heads, sequence, head_dim)."""
    from litgpt.model import apply_rope

    heads = x.transpose(1, 2)
    return torch.cat((apply_rope(heads[..., :ROTARY_DIM], cos, sin), heads[..., ROTARY_DIM:]), -1).transpose(1, 2)


def liger(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rope

    q, k = (y.transpose(1, 2) for y in x.chunk(2, 2))
    rotated = liger_rope(q.clone(), k.clone(), cos, sin, rotary_dim=ROTARY_DIM)
    return torch.cat([y.transpose(1, 2) for y in rotated], 2)


def flash_attn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from flash_attn.layers.rotary import apply_rotary_emb

    return apply_rotary_emb(x, cos, sin)


def ours(x: Tensor, cos: Tensor, sin: Tensor, name: str) -> Op:
    """The op rotates in place. The timed forward rotates a buffer; the timed backward is that of a rotated copy."""
    buffer = x.detach().clone()
    return Op(
        lambda: apply_rotary_(x.clone(), None, cos, sin)[0],
        [x],
        lambda: apply_rotary_(buffer, None, cos, sin),
        note="forward in place",
        backend=("rotary", name),
    )


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_rotary(dtype: str, full: bool, results: Results) -> None:
    where = device()
    batch, sequence, heads = (4, 2048, 32) if full else (2, 16, 4)
    x = leaf(batch, sequence, 2 * heads, HEAD_DIM, dtype=DTYPES[dtype], device=where)
    dout = torch.randn_like(x)
    cos, sin = rotary_table(sequence, ROTARY_DIM, device=where)
    narrow = [table[:, None].to(x.dtype) for table in (cos, sin)]
    wide = [torch.cat((table, table), -1)[None].to(x.dtype) for table in (cos, sin)]

    def of(function: Callable[..., Tensor], tables: list[Tensor]) -> Op:
        return Op(lambda: function(x, *tables), [x])

    fast = compiled(eager, full)
    ops: dict[str, Op | str] = {label: ours(x, cos, sin, name) for label, name in backends("rotary", where).items()}
    ops |= {
        "torch eager": of(eager, narrow),
        "torch.compile": of(fast, narrow) if fast else NOT_COMPILED,
        "transformers": of(transformers, wide),
        "litgpt": peer("litgpt", lambda: of(litgpt, wide)),
        "Liger-Kernel": peer("liger_kernel", lambda: of(liger, wide)),
        "flash-attn": peer("flash_attn", lambda: of(flash_attn, [t[:, 0] for t in narrow])),
    }
    cost = Cost(moved=2 * x.numel() // 2 * x.element_size())
    gradient, rotate_ = dout.clone(), backend.implementation("rotary", where).rotate_
    in_place = Contender(lambda: rotate_(gradient, cos, sin, 0, inverse=True), cost.moved, note="as in the block")
    config = {"batch": batch, "sequence": sequence, "heads": 2 * heads, "head dim": HEAD_DIM, "rotary dim": ROTARY_DIM}
    more = ({}, {"phi_fast, in place": in_place})
    measure(f"rotary, {dtype}", ops, dout, results, costs=(cost, cost), config=config, full=full, more=more)

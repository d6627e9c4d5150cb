"""Lengths that come from a tensor's values (documents) are checked on a CPU before a kernel uses them as addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi_fast.kernels import apply_rotary_, attention, rotary_table, use

TOO_SHORT = "cos and sin have 4 positions for a document of {}; make a longer table"


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("documents", "longest"), [((0, 64), 64), ((0, 4, 9, 9, 64), 55)])
def test_a_document_longer_than_the_table_is_refused(backend: str, documents: tuple[int, ...], longest: int) -> None:
    q = torch.randn(1, 64, 1, 16)
    cos, sin = rotary_table(4, 16)
    with use(backend), pytest.raises(ValueError, match=TOO_SHORT.format(longest)):
        attention(q, q, q, cos=cos, sin=sin, cu_seqlens=ends(*documents))
    op = torch.ops.phi_fast.attention  # as a compiled graph calls it
    with use(backend), pytest.raises(ValueError, match=TOO_SHORT.format(longest)):
        op(q, q, q, 1.0, True, None, ends(*documents), cos, sin)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_table_as_long_as_the_longest_document_is_enough(backend: str) -> None:
    q = torch.randn(1, 8, 1, 16)
    long, short = ({"cos": c[:n], "sin": s[:n]} for c, s in [rotary_table(8, 16)] for n in (8, 4))
    with use(backend):
        results = [attention(q, q, q, cu_seqlens=ends(0, 4, 8), **table) for table in (long, short)]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ((0, 9), r"cu_seqlens\[1\] is 9; expected numbers that do not fall, from 0 to the sequence's 8"),
        ((0, 5), r"cu_seqlens\[1\] is 5"),
        ((1, 8), r"cu_seqlens\[0\] is 1"),
        ((0, 6, 3, 8), r"cu_seqlens\[2\] is 3"),
        ((0, -2, 8), r"cu_seqlens\[1\] is -2"),
    ],
)
def test_documents_that_do_not_cover_the_sequence_are_refused(
    backend: str, documents: tuple[int, ...], message: str
) -> None:
    x = torch.randn(1, 8, 1, 16)
    with use(backend), pytest.raises(ValueError, match=message):
        attention(x, x, x, cu_seqlens=ends(*documents))
    with use(backend), pytest.raises(ValueError, match=message):
        apply_rotary_(x, None, *rotary_table(8, 16), cu_seqlens=ends(*documents))


def test_on_a_gpu_the_table_must_reach_the_sequence() -> None:
    """A GPU's documents are not read. Meta tensors, of which only the shapes are known, stand in for the GPU's."""
    q, (cos, sin) = torch.empty(1, 64, 1, 16, device="meta"), rotary_table(4, 16, device="meta")
    with pytest.raises(ValueError, match="cos and sin have 4 positions for a sequence of 64"):
        attention(q, q, q, cos=cos, sin=sin, cu_seqlens=ends(0, 64).to("meta"))

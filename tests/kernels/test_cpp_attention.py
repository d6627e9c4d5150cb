"""Attention in C++ on every instruction set of this machine; test_attention.py tests only the best one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, run
from numerics import DTYPES, assert_no_worse, double, gradients

from phi_fast._C import cpu
from phi_fast.kernels.attention import attention
from phi_fast.kernels.cpp import attention as kernels
from phi_fast.kernels.reference.attention import AttentionOptions

# Head dims of one number, of a ragged vector, of whole vectors with a ragged tile; more rows than a block, and fewer.
SHAPES: dict[str, dict[str, Any]] = {
    **CASES,
    "head_dim 1": {"sequence": 70, "head_dim": 1, "batch": 10, "heads": 3, "key_heads": 3},
    "head_dim 80, rotary 40": {"sequence": 37, "head_dim": 80, "rotary_dim": 40},
    "head_dim 200, full": {"sequence": 19, "head_dim": 200, "causal": False},
    "5 rows": {"sequence": 5, "batch": 16},
    "192 rows": {"sequence": 192},
}


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_errs_no_more_than_torch(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case(dtype, "cpu", **options)
    plain = gradients(case.plain, case.inputs, case.dout)
    exact = gradients(case.plain, double(case.inputs), case.dout.double())
    for tensor, value in run("cpp", case, case).items():
        assert_no_worse(value, plain[tensor], exact[tensor], f"{isa} {tensor}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_rows_with_gaps(isa: str, dtype: torch.dtype) -> None:
    """Every tensor is a slice with odd strides that starts at an odd element; memory beside it does not change."""
    case = Case(dtype, "cpu", sequence=75, heads=2, key_heads=2, head_dim=63)

    def apart(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = torch.full((x.shape[0], x.shape[1], x.shape[2], x.shape[3] + 8), 7.0, dtype=x.dtype)
        return buffer[..., 3:-5].copy_(x), buffer

    inputs = {name: apart(x) for name, x in (*case.inputs.items(), ("dout", case.dout))}
    outputs = {name: apart(case.dout) for name in ("out", "dq", "dk", "dv")}
    q, k, v, dout = (view for view, _ in inputs.values())
    out, dq, dk, dv = (view for view, _ in outputs.values())
    _, lse = kernels.forward(q, k, v, AttentionOptions(0.125), out=out)
    kernels.backward(dout, q, k, v, out, lse, AttentionOptions(0.125), dq=dq, dk=dk, dv=dv)
    dense = [x.contiguous() for x in (q, k, v, dout)]
    expected, lse = kernels.forward(*dense[:3], AttentionOptions(0.125))
    gradient = [torch.empty_like(x) for x in dense[:3]]
    names = dict(zip(("dq", "dk", "dv"), gradient, strict=True))
    kernels.backward(dense[3], *dense[:3], expected, lse, AttentionOptions(0.125), **names)
    for actual, wanted in zip((out, dq, dk, dv), (expected, *gradient), strict=True):
        assert torch.equal(actual, wanted)
    for _, buffer in outputs.values():
        assert bool((buffer[..., :3] == 7).all() and (buffer[..., -5:] == 7).all())


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    """With more threads than heads, each head is divided."""
    case = Case(torch.bfloat16, "cpu", sequence=300, heads=1, key_heads=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(run("cpp", case, case))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([0, 5, 9], r"cu_seqlens\[2\] is 9; expected numbers that do not fall, from 0 to the sequence's 8"),
        ([0, 5], r"cu_seqlens\[1\] is 5"),
        ([1, 8], r"cu_seqlens\[0\] is 1"),
        ([0, 6, 3, 8], r"cu_seqlens\[2\] is 3"),
        ([0, -2, 8], r"cu_seqlens\[1\] is -2"),
    ],
)
def test_documents_that_leave_the_sequence_are_refused(documents: list[int], message: str) -> None:
    x = torch.zeros(1, 8, 2, 64)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, cu_seqlens=torch.tensor(documents, dtype=torch.int32))


def test_float64_is_refused_with_the_way_out() -> None:
    x = torch.zeros(1, 8, 2, 64, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"not torch.float64; use\('reference', op='attention'\)"):
        attention(x, x, x)

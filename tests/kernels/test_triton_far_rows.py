"""Offsets in Triton's kernels have 64 bits where rows, heads or batches lie more than 2³¹ elements apart.

All tensors are views of one address range of 4 GiB, of which only the pages that they touch take memory. The results
are those of the same tensors side by side, bit for bit.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from guarded import ends_by
from torch import Tensor

pytest.importorskip("triton")
from phi_fast.kernels import backend
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.reference.layer_norm import ResidualStream
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.triton import (
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    muon,
    rotary,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux gives memory to pages that are touched"),
    pytest.mark.skipif(not backend.interpreting(), reason="the interpreter alone uses the CPU's addresses"),
]

LIMIT = 2**31
ROOM = 2**16
"""Elements beside each other at every far place, for all tensors of a test."""

Place = Callable[[Tensor], Tensor]


class Far:
    """Copies of tensors whose element `index` along `axis` lies just beyond 2³¹ elements."""

    def __init__(self, axis: int, index: int, length: int) -> None:
        self._axis, self._stride, self._used = axis, LIMIT // index + 8, 0
        self._memory = mmap.mmap(-1, 2 * (length * self._stride + ROOM), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)  # each would make 2 MiB of a row
        self._elements = torch.frombuffer(self._memory, dtype=torch.float16)

    def __call__(self, x: Tensor) -> Tensor:
        beside = x.select(self._axis, 0)
        strides = list(torch.empty(beside.shape).stride())
        strides.insert(self._axis, self._stride)
        first, self._used = self._used, self._used + beside.numel()
        return self._elements.as_strided(x.shape, strides, first).copy_(x)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).half()


def normalise(place: Place) -> list[Tensor]:
    x, weight, bias = place(draw(3, 20)), draw(20), draw(20)
    stream = ResidualStream(place(draw(3, 20)), place(draw(3, 20)), draw(20), place(draw(3, 20)))
    out, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5, stream, out=place(draw(3, 20)))
    dy, past, dx = (place(draw(3, 20) * i) for i in (1, 2, 3))
    layer_norm.backward(dy, x, weight, mean, rstd, residual_grad=past, dx=dx)
    return [out, stream.summed, stream.shifted, mean, rstd, dx]


def normalise_without_mean(place: Place) -> list[Tensor]:
    x, past, summed, out, dy, dx = (place(draw(3, 20) * (1 + i / 8)) for i in range(6))
    stream = ResidualStream(past, summed)
    _, _, rstd = layer_norm.forward(x, draw(20), None, 1e-6, stream, out=out)
    layer_norm.backward(dy, x, draw(20), None, rstd, residual_grad=past, dx=dx)
    return [out, summed, rstd, dx]


def gate(place: Place) -> list[Tensor]:
    gate, up, out, dout, dgate, dup = (place(draw(3, 20) * (1 + i / 8)) for i in range(6))
    gated_activation.forward(gate, up, out=out)
    gated_activation.backward(dout, gate, up, dgate=dgate, dup=dup)
    return [out, dgate, dup]


def activate(place: Place) -> list[Tensor]:
    x, out, dx, again = (place(draw(3, 20)) for _ in range(4))
    carry, back = (place(draw(3, 8)), place(draw(3, 8) * 2)), (place(draw(3, 8) * 3), place(draw(3, 8) * 4))
    bias_gelu.forward(x, draw(20), out=out, carry=carry)
    bias_gelu.backward(place(draw(3, 20) * 2), x, draw(20), dx=dx, activation=again, carry=back)
    return [out, dx, again, carry[1], back[1]]


def cross_entropy(place: Place) -> list[Tensor]:
    logits, dbias = place(draw(3, 20)), torch.zeros(20)
    arguments = {"objective": Objective(), "scale": torch.ones(()), "need_grad": True, "dbias": dbias}
    losses = linear_cross_entropy.cross_entropy_(logits, torch.tensor([1, -100, 2]), **arguments)
    return [losses, logits, dbias]


def multiply(place: Place) -> list[Tensor]:
    return [muon.symmetric_product(place(draw(3, 20)))]


def turn(place: Place) -> list[Tensor]:
    x, cos, sin = place(draw(3, 3, 3, 16)), draw(3, 4), draw(3, 4)
    rotary.rotate_(x, cos, sin, 0)
    rotary.rotate_(x, cos, sin, 0, interleaved=True)
    return [x]


def attend(place: Place, *shape: int) -> list[Tensor]:
    q, k, v, out, dout, dq, dk, dv = (place(draw(*shape) * (1 + i / 8)) for i in range(8))
    options = AttentionOptions(0.125)
    _, lse = attention.forward(q, k, v, options, out=out)
    attention.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)
    return [out, lse, dq, dk, dv]


CASES: dict[str, tuple[Callable[[Place], list[Tensor]], int, int, int]] = {
    "layer_norm": (normalise, 0, 2, 3),
    "layer_norm, rms_norm": (normalise_without_mean, 0, 2, 3),
    "gated_activation": (gate, 0, 2, 3),
    "bias_gelu": (activate, 0, 2, 3),
    "linear_cross_entropy": (cross_entropy, 0, 2, 3),
    "muon": (multiply, 0, 2, 3),
    "rotary, batches": (turn, 0, 2, 3),
    "rotary, rows": (turn, 1, 2, 3),
    "rotary, heads": (turn, 2, 2, 3),
    "attention, batches": (lambda place: attend(place, 3, 1, 1, 64), 0, 2, 3),
    "attention, rows": (lambda place: attend(place, 1, 130, 1, 64), 1, 128, 130),  # tiles of 128 rows
    "attention, heads": (lambda place: attend(place, 1, 1, 3, 64), 2, 2, 3),
}
"""A call, the axis that is stretched, the index beyond 2³¹, and the axis's length."""


@pytest.mark.parametrize("name", CASES)
def test_far_apart_is_as_side_by_side(name: str) -> None:
    call, axis, index, length = CASES[name]

    def compare() -> None:
        near = call(lambda x: x.clone())
        for i, (one, other) in enumerate(zip(near, call(Far(axis, index, length)), strict=True)):
            assert torch.equal(one, other), i

    assert ends_by(compare) == 0


def test_a_product_of_more_than_2_31_elements_is_written_in_the_right_places() -> None:
    """The last row of tiles, which 364 programs write, and its mirror image in the last columns."""
    rows, first = 46600, 46592
    memory = mmap.mmap(-1, 2 * rows * rows, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    x, out = draw(rows, 8), torch.frombuffer(memory, dtype=torch.float16).view(rows, rows)
    launch = muon._symmetric_launch(muon.TILES["sm_80"], x, None, out, 1.0, 0.0, "ieee")
    expected = (x[first:].float() @ x[:first].float().mT).half()

    def compare() -> None:
        replace(launch, grid=(364,))()
        torch.testing.assert_close(out[first:, :first], expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(out[:first, first:], out[first:, :first].mT)

    assert ends_by(compare) == 0

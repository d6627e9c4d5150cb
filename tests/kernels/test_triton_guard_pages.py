"""Triton's kernels access nothing beside a tensor: each tensor lies between pages that end the process.

Triton's interpreter reads and writes the addresses that a kernel computes, where the masks allow it. Operands, results
and what a launcher allocates in between end just before such pages, or begin just after them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from guarded import Guarded, ends_by
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")
from phi_fast.kernels import backend
from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.reference.layer_norm import ResidualStream
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.triton import (
    adam,
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    muon,
    rotary,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by Linux's C library"),
    pytest.mark.skipif(not backend.interpreting(), reason="the interpreter alone uses the CPU's addresses"),
]

Draw = Callable[..., Tensor]


class Guarding(TorchFunctionMode):
    """What is allocated inside lies between the pages too."""

    ALLOCATING = (torch.empty, torch.empty_like, torch.tensor, Tensor.new_empty)

    def __init__(self, guard: Guarded) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._guard(result) if func in self.ALLOCATING else result


def turn(draw: Draw) -> None:
    """Six pairs, of eight lanes; a position beyond either end of the table."""
    cos, sin = draw(7, 6), draw(7, 6)
    positions = draw(2, 5).long()
    positions.copy_(torch.tensor([[-1, 0, 1, 5, 6], [7, 2, 3, 4, 6]]))
    for interleaved in (False, True):
        rotary.rotate_(draw(2, 5, 3, 12), cos, sin, 2, interleaved=interleaved)
        rotary.rotate_(draw(2, 5, 3, 12), cos, sin, positions, interleaved=interleaved, inverse=True)


def normalise(draw: Draw) -> None:
    """Five rows: in one tile, shared by two programs, and in parts."""
    for d in (5, 2047, layer_norm.WIDE + 1):
        x, weight, bias = draw(5, d), draw(d), draw(d)
        stream = ResidualStream(draw(5, d), None, draw(d), draw(5, d))
        _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5, stream)
        layer_norm.backward(draw(5, d), x, weight, mean, rstd, residual_grad=draw(5, d), dx=draw(5, d))


def normalise_without_mean(draw: Draw) -> None:
    """RMSNorm, in the same three widths."""
    for d in (5, 2047, layer_norm.WIDE + 1):
        x, weight = draw(5, d), draw(d)
        _, _, rstd = layer_norm.forward(x, weight, None, 1e-6, ResidualStream(draw(5, d)))
        layer_norm.backward(draw(5, d), x, weight, None, rstd, residual_grad=draw(5, d), dx=draw(5, d))


def gate(draw: Draw) -> None:
    """Columns for two tiles, the second of them in part, and for part of one."""
    for n in (5, 600):
        gate, up, dout = (draw(5, n) for _ in range(3))
        for activation in ("silu", "gelu_tanh"):
            gated_activation.forward(gate, up, activation=activation)
            gated_activation.backward(dout, gate, up, activation=activation)


def activate(draw: Draw) -> None:
    """Columns for two tiles, the second of them in part, and beside them columns to copy."""
    for n in (600, 1100):
        x, bias, carry = draw(5, n), draw(n), (draw(5, 9), draw(5, 9))
        bias_gelu.forward(x, bias, carry=carry)
        bias_gelu.backward(draw(5, n), x, bias, activation=draw(5, n), carry=carry)


def cross_entropy(draw: Draw) -> None:
    """Two blocks of columns, the second of one column, and a row of each kind: labelled, ignored, wrong label."""
    labels = draw(4).long()
    labels.copy_(torch.tensor([4096, -100, 4097, -1]))
    objective = Objective(label_smoothing=0.1, z_loss=1e-3, class_weight=draw(4097), softcap=5.0)
    for scale in (draw(4), draw(4)[0]):
        linear_cross_entropy.cross_entropy_(
            draw(4, 4097), labels, draw(4097), objective=objective, scale=scale, need_grad=True, dbias=draw(4097)
        )


def step(draw: Draw) -> None:
    """Tensors with a wide part, a remainder, or only that."""
    lists = [[draw(n).abs() for n in (37, 5, 2064)] for _ in range(5)]
    one = draw(1).fill_(1.0)
    options = AdamOptions(one[0], 0.1, (0.9, 0.99), 1e-8, 0.1, True, True, one[0], draw(1).zero_()[0], one[0])
    adam.step_(AdamLists(*lists), options)
    adam.grad_norm_squared(lists[1])


def multiply(draw: Draw) -> None:
    """Two rows of tiles, the second of one row; and a width that fills its last block in part."""
    for rows, width in ((65, 33), (3, 5)):
        gram = muon.symmetric_product(draw(rows, width))
        muon.symmetric_product(draw(rows, width), gram, alpha=2.0, beta=-5.0)


def attend(
    draw: Draw, sequence: int, keys: int, documents: list[int] | None = None, half: int = 0, dim: int = 64, **options
) -> None:
    """Rows and keys that fill their last block in part, and heads that may fill a part of its columns."""
    q, k, v = draw(1, sequence, 2, dim), draw(1, keys, 1, dim), draw(1, keys, 1, dim)
    if documents:
        options["cu_seqlens"] = draw(len(documents)).to(torch.int32)
        options["cu_seqlens"].copy_(torch.tensor(documents))
    if half:
        options["cos"], options["sin"] = draw(keys, half), draw(keys, half)
    chosen = AttentionOptions(0.125, **options)
    out, lse = attention.forward(q, k, v, chosen)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    attention.backward(draw(1, sequence, 2, dim), q, k, v, out, lse, chosen, dq=dq, dk=dk, dv=dv)


CASES: dict[str, Callable[[Draw], None]] = {
    "rotary": turn,
    "layer_norm": normalise,
    "layer_norm, rms_norm": normalise_without_mean,
    "gated_activation": gate,
    "bias_gelu": activate,
    "linear_cross_entropy": cross_entropy,
    "adam": step,
    "muon": multiply,
    "attention": lambda draw: attend(draw, 37, 37, half=16),
    "attention, full": lambda draw: attend(draw, 37, 37, causal=False),
    "attention, documents": lambda draw: attend(draw, 37, 37, [0, 3, 20, 37], half=32),
    "attention, more keys, window": lambda draw: attend(draw, 35, 41, half=16, window=(9, 0)),
    "attention, head_dim 80": lambda draw: attend(draw, 37, 37, half=16, dim=80),
    "attention, head_dim 96": lambda draw: attend(draw, 37, 37, dim=96),
    "attention, fewer keys": lambda draw: attend(draw, 41, 35, causal=False),
}


@contextmanager
def guarded(at_end: bool) -> Iterator[Draw]:
    """A function that draws tensors which are guarded, as are those that are allocated inside."""
    guard, generator = Guarded(at_end), torch.Generator().manual_seed(0)
    with Guarding(guard):
        yield lambda *shape: guard(torch.randn(shape, generator=generator))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_beside_a_tensor_is_touched(name: str, at_end: bool) -> None:
    def call() -> None:
        with guarded(at_end) as draw:
            CASES[name](draw)

    assert ends_by(call) == 0

"""Calls the public ops with valid, nearly valid and invalid arguments: each gives a result or an error with a reason.

Meant for the extension that `csrc/cpu/sanitize.sh` builds: there, an access outside a tensor ends the process with a
report. Without it only crashes and unexpected errors are detected.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phi_fast import kernels
from phi_fast._C import cpu

from .tally import Tally

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.float64, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64]
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError)
"""Exceptions that torch's ops and these may raise; any other is a failure."""
ODD = 0.12
"""Probability that a dimension, a dtype or an index is not what the op expects, in calls with invalid arguments."""
CALLS_PER_ISA = 50


class Draw:
    """Draws the tensors and numbers for one call."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.odds = choose.choice([0, 0, ODD])
        self.layouts = choose.choice([1, 2, 6])
        """Layout of a tensor: contiguous, with distance between rows, or any."""
        self.dtype = choose.choice(DTYPES)
        self.rows, self.batch, self.sequence = choose.randint(0, 5), choose.randint(1, 3), choose.randint(1, 20)
        self.key_heads = choose.randint(1, 2)
        self.heads = self.key_heads * choose.randint(1, 2)
        self.width, self.head_dim = choose.randint(1, 70), choose.choice([2, 7, 8, 16, 32, 33, 64, 80])
        self.classes, self.half = choose.randint(1, 40), choose.randint(1, max(1, self.head_dim // 2))

    def odd(self) -> bool:
        return self.choose.random() < self.odds

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.choose.random() < 0.5 else None

    def shape(self, sizes: tuple[int, ...]) -> list[int]:
        """The sizes, or with one of them changed, missing, or added."""
        result = list(sizes)
        if result and self.choose.random() < self.odds / 2:
            at = self.choose.randrange(len(result))
            result[at] = max(0, self.choose.choice([0, 1, result[at] - 1, result[at] + 1, 2 * result[at]]))
        if result and self.choose.random() < self.odds / 4:
            result = result[:-1] if self.choose.random() < 0.5 else [1, *result]
        return result

    def tensor(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, sometimes in a buffer with other strides, sometimes requiring gradients."""
        dtype = dtype or self.dtype
        shape = self.shape(sizes)
        x = torch.randn(shape).to(self.choose.choice(OTHER_DTYPES) if self.choose.random() < self.odds / 8 else dtype)
        layout = self.choose.randrange(self.layouts)
        if layout == 1 and shape:  # distance between rows, which begin in the middle of a vector
            x = torch.cat((x[..., :1], x, x[..., :1]), -1)[..., bool(x.shape[-1]) :][..., : x.shape[-1]]
        elif layout == 2 and len(shape) > 1:  # a last stride that is not 1
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == 3 and len(shape) > 2:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == 4 and shape and shape[0]:  # one row, expanded
            x = x[:1].expand(shape)
        return x.requires_grad_() if x.is_floating_point() and self.choose.random() < 0.5 else x

    def integers(self, low: int, high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers from low to high - 1, sometimes with another length, dtype or range."""
        if self.odd():
            low, high = self.choose.choice([(-1, high), (low, high + 2), (-(2**31), 2**31), (high, high + 1)])
        dtype = self.choose.choice([torch.int32, torch.int64, torch.float32]) if self.odd() else dtype
        return torch.randint(low, max(high, low + 1), self.shape(sizes)).to(dtype)

    def ends(self) -> Tensor:
        """cu_seqlens of the sequence, or invalid numbers."""
        inner = sorted(self.choose.randint(0, self.sequence) for _ in range(self.choose.randint(0, 4)))
        numbers = [0, *inner, self.sequence]
        if self.odd():
            numbers[self.choose.randrange(len(numbers))] = self.choose.choice([-1, -(2**31), 2**31 - 1, 1, 50])
        if self.odd():
            self.choose.shuffle(numbers)
        return torch.tensor(numbers[: 1 if self.odd() else None], dtype=torch.int64 if self.odd() else torch.int32)

    def table(self) -> tuple[Tensor, Tensor]:
        length = self.sequence + self.choose.choice([0, 5, -1 if self.odd() else 0])
        pair = [torch.randn(self.shape((max(0, length), self.half))) for _ in range(2)]
        return pair[0], pair[1]


def layer_norm(draw: Draw) -> Any:
    x = (draw.rows, draw.sequence, draw.width)
    vectors = draw.tensor(draw.width), draw.tensor(draw.width)
    return kernels.layer_norm(draw.tensor(*x), *vectors, residual=draw.maybe(lambda: draw.tensor(*x)))


def bias_gelu(draw: Draw) -> Any:
    approximate = draw.choose.choice(["tanh", "none"])
    bias = draw.maybe(lambda: draw.tensor(draw.width))
    return kernels.bias_gelu(draw.tensor(draw.rows, draw.width), bias, approximate=approximate)


def gated_activation(draw: Draw) -> Any:
    activation = draw.choose.choice(["silu", "gelu_tanh"])
    up = draw.maybe(lambda: draw.tensor(draw.rows, draw.width))
    return kernels.gated_activation(draw.tensor(draw.rows, draw.width), up, activation=activation)


def rotary(draw: Draw) -> Any:
    kind = draw.choose.randrange(4)
    batch = 1 if kind == 3 else draw.batch
    q = draw.tensor(batch, draw.sequence, draw.heads, draw.head_dim).detach()
    k = draw.maybe(lambda: draw.tensor(batch, draw.sequence, draw.key_heads, draw.head_dim).detach())
    cos, sin = draw.table()
    given: dict[str, Any] = {"interleaved": draw.choose.random() < 0.5}
    if kind == 1:
        given["offset"] = draw.choose.choice([0, 1, 5, -1, 2**40] if draw.odds else [0, 0, 1, 5])
    elif kind == 2:
        given["positions"] = draw.integers(0, cos.shape[0], batch, draw.sequence)
    elif kind == 3:
        given["cu_seqlens"] = draw.ends()
    return kernels.apply_rotary_(q, k, cos, sin, **given)


def attention(draw: Draw) -> Any:
    packed = draw.choose.random() < 0.4
    batch = 1 if packed else draw.batch
    q = draw.tensor(batch, draw.sequence, draw.heads, draw.head_dim)
    k, v = (draw.tensor(batch, draw.sequence, draw.key_heads, draw.head_dim) for _ in range(2))
    cos, sin = draw.table() if draw.choose.random() < 0.5 else (None, None)
    ends = draw.ends() if packed else None
    return kernels.attention(q, k, v, causal=draw.choose.random() < 0.7, cu_seqlens=ends, cos=cos, sin=sin)


def linear_cross_entropy(draw: Draw) -> Any:
    options = {
        "reduction": draw.choose.choice(["mean", "sum", "none"]),
        "label_smoothing": draw.choose.choice([0.0, 0.1]),
        "z_loss": draw.choose.choice([0.0, 0.01]),
        "chunk_size": draw.choose.choice([None, 1, 3]),
        "softcap": draw.choose.choice([None, 5.0]),
        "class_weight": draw.maybe(lambda: draw.tensor(draw.classes, dtype=torch.float32).detach().abs()),
    }
    hidden, weight = draw.tensor(draw.rows, draw.width), draw.tensor(draw.classes, draw.width)
    bias = draw.maybe(lambda: draw.tensor(draw.classes))
    return kernels.linear_cross_entropy(hidden, weight, bias, draw.integers(0, draw.classes, draw.rows), **options)


def parallel_block(draw: Draw) -> Any:
    d, m = draw.heads * draw.head_dim, draw.width
    if draw.choose.random() < 0.7:  # parameters with other strides are refused
        draw.layouts = 1
    matrices = draw.tensor(3 * d + m, d), draw.tensor(3 * d + m), draw.tensor(d, d + m)
    vectors = [draw.tensor(d) for _ in range(4)]
    return kernels.parallel_block(
        draw.tensor(draw.batch, draw.sequence, d),
        *vectors[:2],
        *matrices,
        *vectors[2:],
        *draw.table(),
        num_heads=draw.heads + int(draw.odd()),
        recompute=draw.choose.choice(["none", "norm_gelu", "all"]),
    )


def adam(draw: Draw) -> Any:
    sizes = [draw.shape((draw.choose.randint(0, 200),)) for _ in range(draw.choose.randint(1, 4))]
    parameters = [torch.randn(size).to(draw.dtype).requires_grad_() for size in sizes]
    optimizer = kernels.FusedAdam(parameters, master_weights=draw.choose.random() < 0.5)
    for parameter in parameters:
        parameter.grad = draw.maybe(lambda p=parameter: torch.randn_like(p))
    optimizer.step()
    for state in optimizer.state.values():  # as after loading another model's checkpoint
        for name in [name for name, value in state.items() if isinstance(value, Tensor) and draw.odd()]:
            state[name] = draw.tensor(*state[name].shape, dtype=torch.float32).detach()
    optimizer.step()


OPS = (layer_norm, bias_gelu, gated_activation, rotary, attention, linear_cross_entropy, parallel_block, adam)


def call(op: Callable[[Draw], Any], draw: Draw) -> None:
    """Run forward, and backward if an input requires gradients."""
    results = op(draw)
    for result in results if isinstance(results, tuple) else [results]:
        if isinstance(result, Tensor) and result.requires_grad:
            result.backward(torch.ones_like(result), retain_graph=True)


def attack(tally: Tally, seed: int) -> None:
    """Each call has its own seed: the campaign's plus the number of calls before it, which is known after a crash."""
    while tally.more():
        number = tally.counts.done
        if number % CALLS_PER_ISA == 0:
            isas = cpu.supported_isas()
            cpu.force_isa(isas[number // CALLS_PER_ISA % len(isas)])
        torch.manual_seed(seed + number)
        choose = random.Random(seed + number)
        op = choose.choice(OPS)
        try:
            with kernels.use("cpp"):
                call(op, Draw(choose))
        except REFUSALS as error:
            if not str(error):
                tally.failed(f"{op.__name__}, seed {seed + number}: {type(error).__name__} without a message")
        except Exception as error:
            tally.raised(f"{op.__name__}, seed {seed + number}", error)
        tally.did()
        tally.write()

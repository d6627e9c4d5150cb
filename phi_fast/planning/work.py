"""The kernels of a training step; their FLOPs and bytes are counted from the code of `kernels/` and DeepSpeed.

The block's kernels are those of `kernels/parallel_block.py`, and the head's are those of
`kernels/linear_cross_entropy_chunks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..config import LoraConfig, PhiConfig
from ..kernels.linear_cross_entropy_chunks import rows_of_a_chunk
from ..kernels.reference.weight_gradient import ADDS_TO_FP32
from .devices import Kind

Recompute = Literal["none", "norm_gelu", "all"]
Phase = Literal["forward", "backward", "gradients", "update"]


OUT_OF_BLOCK = ("out_proj", "adapter of dense", "adapter of fc2")
"""Kernels of the block's last product, which is not computed again."""


@dataclass(frozen=True)
class Shape:
    """The shape of one rank's micro-batch, and how it is computed."""

    config: PhiConfig
    sequence: int
    """Tokens per row."""
    rows: int
    """Rows per micro-batch."""
    itemsize: int
    """Bytes per weight or activation: 2 or 4."""
    recompute: Recompute
    rotary_inside: bool
    """True if the attention kernel rotates q and k while it reads them (`kernels.fuse_rotary`)."""
    on_cpu: bool = False
    """On a CPU the loss has a larger minimum chunk of logits (`rows_of_a_chunk`)."""
    lora: LoraConfig | None = None
    """Adapters that are trained beside frozen weights (--lora-rank); None: all weights are trained."""

    @property
    def trained(self) -> int:
        """Number of parameters that have gradients and optimizer state."""
        return self.lora.num_parameters(self.config) if self.lora else self.config.num_parameters()

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence

    @property
    def chunk(self) -> int:
        """Rows of logits held at a time (`linear_cross_entropy`'s default)."""
        return rows_of_a_chunk(self.tokens, self.config.hidden_size, self.itemsize, on_cpu=self.on_cpu)

    @property
    def chunks(self) -> int:
        return math.ceil(self.tokens / self.chunk)


@dataclass(frozen=True)
class Kernel:
    """A kernel, launched `count` times per micro-batch (phases forward, backward, gradients) or per step (update)."""

    name: str
    phase: Phase
    kind: Kind
    flops: float
    """Executed per launch."""
    bytes_moved: float
    """Read from and written to memory per launch."""
    count: int = 1


def micro_batch(shape: Shape) -> list[Kernel]:
    """List the kernels of forward and backward of one micro-batch, without DeepSpeed's work on the gradients."""
    layers = shape.config.num_hidden_layers
    blocks = [replace(kernel, count=layers * kernel.count) for kernel in block(shape)]
    forward = [kernel for kernel in blocks if kernel.phase == "forward"]
    return [*forward, *head(shape), *_embedding(shape), *(kernel for kernel in blocks if kernel.phase == "backward")]


def block(shape: Shape) -> list[Kernel]:
    """List the kernels of forward and backward of one layer."""
    forward = list(_block_forward(shape))
    kernels = _with("forward", forward)
    if shape.recompute == "all":  # the block's forward again, except its last product
        kernels += _with("backward", [k for k in forward if k.name not in OUT_OF_BLOCK])
    return [*kernels, *_with("backward", list(_block_backward(shape)))]


def gradients(parameters: int, itemsize: int, ranks: int, *, accumulating: bool, deferred: int = 1) -> list[Kernel]:
    """List what is done to a micro-batch's gradients, of so many trained parameters, on the device.

    DeepSpeed 0.19.8 copies them into the bucket, divides, flattens, copies back from the reduction, and accumulates
    this rank's part in fp32 (`stage_1_and_2.py`: average_tensor and below). deferred: number of micro-batches whose sum
    is reduced at once; with more than 1, each is added to fp32 sums (`training.deferred_gradients`). A single rank only
    accumulates micro-batches (`training.local_gradients`).
    """
    copies = Kernel("buckets", "gradients", "memory", 0, 8 * itemsize * parameters / deferred)
    added = Kernel("fp32 accumulation", "gradients", "memory", 0, (itemsize + 8) * parameters / ranks / deferred)
    sums = Kernel("fp32 sums", "gradients", "memory", 0, (itemsize + 8) * parameters)
    if ranks == 1:
        return [added] if accumulating else []
    return [copies, added, *([sums] if deferred > 1 else [])]


def gradient_itemsize(itemsize: int, ranks: int, *, accumulating: bool) -> int:
    """Return the bytes per element of the gradients that the update reads: autograd's own, or accumulated in fp32."""
    return 4 if ranks > 1 or accumulating else itemsize


def update(parameters: int, itemsize: int, ranks: int, *, accumulating: bool) -> list[Kernel]:
    """List the kernels of the fused step on this rank's part (`zero.FusedStep`): a norm of the gradients, then Adam.

    parameters: number of trained parameters.
    """
    part, gradient = parameters / ranks, gradient_itemsize(itemsize, ranks, accumulating=accumulating)
    adam = (gradient + 3 * 8 + itemsize) * part  # gradient read; master, m, v read and written; weight written
    return [Kernel("norm", "update", "memory", 0, gradient * part), Kernel("adam", "update", "memory", 0, adam)]


def _with(phase: Phase, kernels: list[Kernel]) -> list[Kernel]:
    return [replace(kernel, phase=phase) for kernel in kernels]


def _product(
    name: str, m: float, n: float, k: float, itemsize: int, phase: Phase = "forward", count: int = 1
) -> Kernel:
    """Make the kernel of a matrix product (m, k) · (k, n)."""
    return Kernel(name, phase, "product", 2.0 * m * n * k, float(itemsize * (m * k + k * n + m * n)), count)


def _block_forward(shape: Shape) -> Iterator[Kernel]:
    tokens, d, e = shape.tokens, shape.config.hidden_size, shape.itemsize
    row = float(tokens * d * e)  # bytes of a (T, d) buffer
    yield Kernel("layer_norm", "forward", "memory", 0, 3 * row)  # x read; h and x + bias written
    yield _product("in_proj", tokens, 7 * d, d, e)
    if not shape.rotary_inside:
        yield Kernel("rotary", "forward", "memory", 0, 2 * row)  # half of q and k, both ways
    yield Kernel("attention", "forward", "attention forward", 2.0 * tokens * shape.sequence * d, 4 * row)
    carried = 2 if shape.recompute == "norm_gelu" else 0  # o into [o | g]
    yield Kernel("gelu", "forward", "memory", 0, (8 + carried) * row)
    yield _product("out_proj", tokens, d, 5 * d, e)
    yield from _adapters(shape, "forward", 1)


def _adapters(shape: Shape, phase: Phase, passes: float) -> Iterator[Kernel]:
    """The two products of each adapter, `passes` times: x Aᵀ, and the product with B added to the output in place."""
    for target, (a, b) in shape.lora.shapes(shape.config).items() if shape.lora else ():
        one = _product("", shape.tokens, a[0], a[1], shape.itemsize)
        two = _product("", shape.tokens, b[0], b[1], shape.itemsize)
        moved = one.bytes_moved + two.bytes_moved + shape.tokens * b[0] * shape.itemsize  # the output read, too
        yield Kernel(f"adapter of {target}", phase, "product", passes * (one.flops + two.flops), passes * moved)


def _block_backward(shape: Shape) -> Iterator[Kernel]:
    tokens, d, e = shape.tokens, shape.config.hidden_size, shape.itemsize
    row = float(tokens * d * e)
    again, whole = shape.recompute == "norm_gelu", shape.lora is None
    yield _product("out_proj data gradient", tokens, 5 * d, d, e)
    # FlashAttention's backward has five products, and its forward two: q·k is computed again.
    yield Kernel("attention", "backward", "attention backward", 5.0 * tokens * shape.sequence * d, 8 * row)
    if not shape.rotary_inside:
        yield Kernel("rotary", "backward", "memory", 0, 2 * row)
    yield Kernel("gelu", "backward", "memory", 0, (18 if again else 12) * row)
    if whole:
        yield _product("out_proj weight gradient", d, 5 * d, tokens, e)
        yield Kernel("bias gradients", "backward", "memory", 0, 4 * row)
    if again:
        yield Kernel("layer_norm again", "backward", "memory", 0, 2 * row)
    if whole:
        yield _product("in_proj weight gradient", 7 * d, d, tokens, e)
    # x Aᵀ again, the gradients of x Aᵀ and x, and of A and B: two and a half times the forward.
    yield from _adapters(shape, "backward", 2.5)
    yield _product("in_proj data gradient", tokens, d, 7 * d, e)
    yield Kernel("layer_norm", "backward", "memory", 0, 4 * row)


def head(shape: Shape) -> Iterator[Kernel]:
    """List the kernels of final LayerNorm, lm_head and loss; the gradients' products are part of the forward."""
    tokens, d, e, vocabulary = shape.tokens, shape.config.hidden_size, shape.itemsize, shape.config.vocab_size
    row, weight, chunk = float(tokens * d * e), vocabulary * d, tokens / shape.chunks
    yield Kernel("final_norm", "forward", "memory", 0, 2 * row)
    yield _product("logits", chunk, vocabulary, d, e, count=shape.chunks)
    yield Kernel("cross_entropy", "forward", "memory", 0, 3.0 * tokens * vocabulary * e)  # read twice, written once
    yield _product("hidden gradient", chunk, d, vocabulary, e, count=shape.chunks)
    if shape.lora is None:
        yield _product("lm_head gradient", vocabulary, d, chunk, e, count=shape.chunks)
        in_place = e == 4 or (ADDS_TO_FP32 and not shape.on_cpu)
        adding = 8 if in_place else 16  # else a 16-bit product is written in fp32 before it is added
        yield Kernel("lm_head gradient, added up in fp32", "forward", "memory", 0, adding * weight, shape.chunks)
    scaled = tokens * d + (weight if shape.lora is None else 0)
    yield Kernel("loss gradients, scaled", "backward", "memory", 0, (4.0 + e) * scaled)
    yield Kernel("final_norm", "backward", "memory", 0, 3 * row)


def _embedding(shape: Shape) -> Iterator[Kernel]:
    row = float(shape.tokens * shape.config.hidden_size * shape.itemsize)
    yield Kernel("embedding", "forward", "memory", 0, 2 * row)
    dense = shape.config.vocab_size * shape.config.hidden_size * shape.itemsize
    if shape.lora is None:
        yield Kernel("embedding", "backward", "memory", 0, dense + 3 * row)

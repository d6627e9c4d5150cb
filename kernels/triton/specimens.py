"""The launches that `codegen` compiles: what the launchers make on meta tensors of a model's shapes, recorded.

The kernels' arguments, tiles and grids are the launchers' own. What is stated here is which calls are looked at, and
the bytes that each must move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.adam import AdamLists, AdamOptions
from ..reference.attention import AttentionOptions
from ..reference.layer_norm import ResidualStream
from ..reference.linear_cross_entropy import Objective
from . import adam, attention, bias_gelu, layer_norm, linear_cross_entropy, rotary
from .common import Launch, recording

TOKENS, WIDTH, HEADS, VOCABULARY = 8192, 2048, 32, 51200  # of phi-1.5


@dataclass(frozen=True)
class Specimen:
    """A launch at a model's shapes, with the bytes it moves through memory and the fewest that the work needs."""

    name: str
    """op.pass, for example "layer_norm.backward"."""
    launch: Launch
    bytes_moved: int
    """Global bytes read and written by the whole launch, each tensor once a pass over it."""
    bytes_bound: int
    """The design's bound for this work."""
    note: str = ""
    """What the reader must know of the shape: "(tokens, d) fp16"."""


def specimens(architecture: str, dtype: torch.dtype) -> list[Specimen]:
    """The kernels as phi-1.5 calls them, and attention as other models do."""
    return [
        *_adam_specimens(architecture, dtype),
        *_attention_specimens(architecture, dtype),
        *_attention_specimens(architecture, dtype, ", rotary inside", rotary_dim=32),
        *_attention_specimens(architecture, dtype, ", documents", batch=1, documents=8),
        *_attention_specimens(
            architecture, dtype, ", head_dim 128, 4 queries a key", heads=16, key_heads=4, head_dim=128
        ),
        *_bias_gelu_specimens(architecture, dtype),
        *_layer_norm_specimens(architecture, dtype),
        *_linear_cross_entropy_specimens(architecture, dtype),
        *_rotary_specimens(architecture, dtype),
    ]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _adam_specimens(architecture: str, dtype: torch.dtype, elements: int = 2**28) -> Iterator[Specimen]:
    """One flat partition: 16-bit weights and gradients, fp32 master and state; and its gradient's norm."""
    param, grad = (_empty(elements, dtype=dtype) for _ in range(2))
    exp_avg, exp_avg_sq, master, scalar = *(_empty(elements) for _ in range(3)), _empty()
    options = AdamOptions(scalar, 2e-4, (0.9, 0.98), 1e-7, 0.1, True, True, scalar, scalar, scalar)
    with recording(architecture) as launches:
        adam.step_(AdamLists([param], [grad], [exp_avg], [exp_avg_sq], [master]), options)
        adam.grad_norm_squared([grad])
    step, norm = launches
    note = f"{elements} {_words(dtype)} weights, fp32 master"
    moved = param.nbytes + grad.nbytes + 2 * (exp_avg.nbytes + exp_avg_sq.nbytes + master.nbytes)
    yield Specimen("adam.step", step, moved, moved, note)
    yield Specimen("adam.norm", norm, grad.nbytes, grad.nbytes, note)


def _attention_specimens(
    architecture: str,
    dtype: torch.dtype,
    note: str = "",
    *,
    batch: int = 2,
    sequence: int = 2048,
    heads: int = HEADS,
    key_heads: int = 0,
    head_dim: int = 64,
    rotary_dim: int = 0,
    documents: int = 0,
    causal: bool = True,
    window: tuple[int, int] | None = None,
) -> Iterator[Specimen]:
    """Both passes on q, k and v as slices of the parallel block's packed buffer. key_heads 0: as many as heads."""
    width, key_width = heads * head_dim, (key_heads or heads) * head_dim

    def split(packed: Tensor) -> list[Tensor]:
        parts = packed.split((width, key_width, key_width, 4 * width), -1)[:3]
        return [part.unflatten(-1, (-1, head_dim)) for part in parts]

    q, k, v = split(_empty(batch, sequence, 5 * width + 2 * key_width, dtype=dtype))
    dq, dk, dv = split(_empty(batch, sequence, 5 * width + 2 * key_width, dtype=dtype))
    out = _empty(batch, sequence, heads, head_dim, dtype=dtype)
    dout = _empty(batch, sequence, 5 * width, dtype=dtype)[..., :width].unflatten(-1, (heads, head_dim))
    cu_seqlens = _empty(documents + 1, dtype=torch.int32) if documents else None
    cos = sin = _empty(sequence, rotary_dim // 2) if rotary_dim else None
    options = AttentionOptions(head_dim**-0.5, causal, window, cu_seqlens, cos, sin)
    with recording(architecture) as launches:
        _, lse = attention.forward(q, k, v, options, out=out)
        attention.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)
    note = f"({batch}, {sequence}, {heads}, {head_dim}) {_words(dtype)}{note}"
    for name, launch in zip(("forward", "dq", "dkv"), launches, strict=True):
        operands = [x for argument, x in launch.arguments.items() if argument.endswith("_pointer")]
        moved = sum(x.numel() * x.element_size() for x in operands)
        yield Specimen(f"attention.{name}", launch, moved, moved, note)


def _bias_gelu_specimens(architecture: str, dtype: torch.dtype) -> Iterator[Specimen]:
    """The calls of the parallel block: slices of the packed buffers; o carried along, the activation written again."""
    packed, dpacked = (_empty(TOKENS, 7 * WIDTH, dtype=dtype) for _ in range(2))
    mixed, dmixed = (_empty(TOKENS, 5 * WIDTH, dtype=dtype) for _ in range(2))
    o, u, du = _empty(TOKENS, WIDTH, dtype=dtype), packed[:, 3 * WIDTH :], dpacked[:, 3 * WIDTH :]
    with recording(architecture) as launches:
        bias_gelu.forward(u, None, out=mixed[:, WIDTH:])
        bias_gelu.forward(u, None, out=mixed[:, WIDTH:], carry=(o, mixed[:, :WIDTH]))
        dg = dmixed[:, WIDTH:]
        bias_gelu.backward(dg, u, None, dx=du, activation=dg, carry=(o, dmixed[:, :WIDTH]))
    plain, carrying, again = launches
    element, carried, partial = 4 * o.nbytes, 2 * o.nbytes, 2 * again.arguments["partial"].nbytes
    note = f"({TOKENS}, {4 * WIDTH}) {_words(dtype)}"
    beside = f"{note}, o copied beside"
    yield Specimen("bias_gelu.forward", plain, 2 * element, 2 * element, note)
    yield Specimen("bias_gelu.forward_carrying", carrying, 2 * element + carried, 2 * element, beside)
    again_note = f"{note}, g written again, o copied beside"
    yield Specimen("bias_gelu.backward", again, 4 * element + carried + partial, 4 * element, again_note)


def _layer_norm_specimens(architecture: str, dtype: torch.dtype) -> Iterator[Specimen]:
    """The calls of the parallel block: forward with the residual stream's copy, and backward with its gradient."""
    x, shifted, dy = (_empty(TOKENS, WIDTH, dtype=dtype) for _ in range(3))
    vector = _empty(WIDTH, dtype=dtype)
    with recording(architecture) as launches:
        _, mean, rstd = layer_norm.forward(x, vector, vector, 1e-5)
        layer_norm.forward(x, vector, vector, 1e-5, ResidualStream(shift=vector, shifted=shifted))
        layer_norm.backward(dy, x, vector, mean, rstd, residual_grad=dy)
    plain, with_shift, backward = launches
    note, partial = f"({TOKENS}, {WIDTH}) {_words(dtype)}", 2 * backward.arguments["partial"].nbytes
    shift_note = f"{note}, with x + biases written for the block's last product"
    yield Specimen("layer_norm.forward", plain, 2 * x.nbytes, 2 * x.nbytes, note)
    yield Specimen("layer_norm.forward_shifted", with_shift, 3 * x.nbytes, 3 * x.nbytes, shift_note)
    backward_note = f"{note}, with the residual's gradient"
    yield Specimen("layer_norm.backward", backward, 4 * x.nbytes + partial, 4 * x.nbytes, backward_note)


def _linear_cross_entropy_specimens(architecture: str, dtype: torch.dtype, rows: int = 4096) -> Iterator[Specimen]:
    """The kernels on one chunk of phi-1.5's logits."""
    logits, bias = _empty(rows, VOCABULARY, dtype=dtype), _empty(VOCABULARY, dtype=dtype)
    labels, scale, sums = _empty(rows, dtype=torch.int64), _empty(), _empty(VOCABULARY)
    cross_entropy_, objective = linear_cross_entropy.cross_entropy_, Objective()
    with recording(architecture) as launches:
        cross_entropy_(logits, labels, bias, objective=objective, scale=scale, need_grad=True, dbias=sums)
        cross_entropy_(logits, labels, bias, objective=objective, scale=scale, need_grad=False)
    gradient, dbias, loss = launches
    chunk, note, name = logits.nbytes, f"({rows}, {VOCABULARY}) {_words(dtype)}", "linear_cross_entropy"
    twice = f"{note}; the second read of a row is counted as an L2 hit"
    yield Specimen(f"{name}.loss_and_gradient", gradient, 2 * chunk, 2 * chunk, twice)
    yield Specimen(f"{name}.loss", loss, chunk, chunk, note)
    yield Specimen(f"{name}.bias_gradient", dbias, chunk, chunk, note)


def _rotary_specimens(
    architecture: str, dtype: torch.dtype, batch: int = 4, sequence: int = 2048
) -> Iterator[Specimen]:
    """q and k of phi-1.5's packed buffer (tokens, 7d), both ways."""
    batch, sequence = 4, TOKENS // 4
    packed = _empty(batch, sequence, 7 * WIDTH, dtype=dtype)
    x = packed[..., : 2 * WIDTH].unflatten(-1, (2 * HEADS, -1))
    cos, sin = (_empty(sequence, 16) for _ in range(2))
    with recording(architecture) as launches:
        rotary.rotate_(x, cos, sin, 0)
        rotary.rotate_(x, cos, sin, 0, inverse=True)
    moved = TOKENS * 2 * HEADS * 32 * 2 * dtype.itemsize
    note = f"q, k of ({TOKENS}, {7 * WIDTH}) {_words(dtype)}"
    for name, launch in zip(("forward", "backward"), launches, strict=True):
        yield Specimen(f"rotary.{name}", launch, moved, moved, note)

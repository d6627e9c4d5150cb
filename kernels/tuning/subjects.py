"""The launches of a model's training step, made one op at a time on tensors of the sizes that the model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..linear_cross_entropy_chunks import rows_of_a_chunk
from ..reference.adam import AdamLists, AdamOptions
from ..reference.attention import AttentionOptions
from ..reference.layer_norm import ResidualStream
from ..reference.linear_cross_entropy import Objective
from ..triton import adam, attention, bias_gelu, gated_activation, layer_norm, linear_cross_entropy, muon, rotary
from ..triton.attention_tiles import Case as AttentionCase
from ..triton.attention_tiles import case_of
from .shape import Shape


@dataclass(frozen=True)
class Call:
    """One op's work, whose tensors are made when it is prepared."""

    op: str
    prepare: Callable[[], Callable[[], Any]]
    """Makes the tensors, and returns a function that launches the kernels on them, as often as it is called."""
    count: int
    """Calls per micro-batch."""


def calls(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Call]:
    """The ops of a step of `shape`, as `parallel_block`, the loss and `FusedAdam` call them; the longest first."""
    make = Make(shape, dtype, device)
    chunk = rows_of_a_chunk(shape.tokens, shape.hidden_size, dtype.itemsize, on_cpu=False)
    chunks = -(-shape.tokens // chunk)
    gelu = [Call("bias_gelu", partial(make.gelu, again=again), shape.layers) for again in (True, False)]
    activations = [Call("gated_activation", make.gate, shape.layers)] if shape.gated else gelu
    found = [
        Call("attention", make.attention, shape.layers),
        Call("linear_cross_entropy", partial(make.loss, chunk, need_grad=True), chunks),
        activations[0],
        Call("layer_norm", partial(make.norm_backward, residual=True), shape.layers),
        Call("layer_norm", partial(make.norm, shifted=True), shape.layers),
        Call("adam", partial(make.adam, dtype), 1),
        Call("layer_norm", partial(make.norm, shifted=False), shape.layers),
        *activations[1:],
        Call("layer_norm", partial(make.norm_backward, residual=False), 1),
        Call("linear_cross_entropy", partial(make.loss, chunk, need_grad=False), 1),
        Call("linear_cross_entropy", make.loss_on_chip, 1),
        Call("muon", make.muon, 1),
    ]
    if dtype.itemsize == 2:
        found.append(Call("adam", partial(make.adam, torch.float32), 1))  # gradients that micro-batches or ranks add up
    if shape.rotary_dim and not shape.rotary_inside:
        found.insert(5, Call("rotary", make.rotation, shape.layers))
    return found


class Make:
    """Makes the tensors of each op, and the function that calls it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.d, self.wide = shape.hidden_size, shape.intermediate_size
        self.key_width = (shape.key_heads or shape.heads) * shape.head_dim
        self.packed_width, self.mixed_width = self.d + 2 * self.key_width + self.wide, self.d + self.wide
        self.tokens = shape.tokens

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def heads(self, packed: Tensor) -> list[Tensor]:
        """(rows, sequence, packed) -> q, k, v: (rows, sequence, heads, head_dim), views."""
        widths = (self.d, self.key_width, self.key_width, packed.shape[-1] - self.d - 2 * self.key_width)
        return [part.unflatten(-1, (-1, self.shape.head_dim)) for part in packed.split(widths, -1)[:3]]

    def tables(self) -> tuple[Tensor, Tensor]:
        half = self.shape.rotary_dim // 2
        cos, sin = (self.normal(self.rows_and_length()[1], half, dtype=torch.float32) for _ in range(2))
        return cos, sin

    def rows_and_length(self) -> tuple[int, int]:
        """Documents are joined to one row."""
        shape = self.shape
        return (1, shape.tokens) if shape.documents else (shape.rows, shape.sequence)

    def attention(self) -> Callable[[], Any]:
        return self.attention_by(attention)[0]

    def attention_by(self, kernels: Any) -> tuple[Callable[[], Any], AttentionCase]:
        """Both passes of attention by the module `kernels`, and their case."""
        rows, length = self.rows_and_length()
        q, k, v = self.heads(self.normal(rows, length, self.packed_width))
        dq, dk, dv = self.heads(self.empty(rows, length, self.packed_width))
        out, dout = (
            mixed[..., : self.d].unflatten(-1, (self.shape.heads, -1))
            for mixed in (self.normal(rows, length, self.mixed_width) for _ in range(2))
        )
        options = self.attention_options()
        _, lse = kernels.forward(q, k, v, options, out=out)  # real values: the backward's exponents must be finite

        def run() -> None:
            kernels.forward(q, k, v, options, out=out)
            kernels.backward(dout, q, k, v, out, lse, options, dq=dq, dk=dk, dv=dv)

        return run, case_of(q, k, options)

    def attention_options(self) -> AttentionOptions:
        options = AttentionOptions(self.shape.head_dim**-0.5, self.shape.causal, None, self.ends())
        if not self.shape.rotary_inside:
            return options
        cos, sin = self.tables()
        return options._replace(cos=cos, sin=sin)

    def ends(self) -> Tensor | None:
        """(documents + 1,): the ends of documents of like lengths."""
        if not self.shape.documents:
            return None
        ends = torch.linspace(0, self.shape.tokens, self.shape.documents + 1, device="cpu").to(torch.int32)
        return ends.to(self.device)

    def rotation(self) -> Callable[[], Any]:
        packed = self.normal(*self.rows_and_length(), self.packed_width)
        x = packed[..., : self.d + self.key_width].unflatten(-1, (-1, self.shape.head_dim))
        cos, sin = self.tables()

        def run() -> None:
            rotary.rotate_(x, cos, sin, 0)
            rotary.rotate_(x, cos, sin, 0, inverse=True)

        return run

    def norm(self, *, shifted: bool) -> Callable[[], Any]:
        x, out, vector = self.normal(self.tokens, self.d), self.empty(self.tokens, self.d), self.normal(self.d)
        stream = ResidualStream(shift=vector, shifted=torch.empty_like(x)) if shifted else ResidualStream()
        return lambda: layer_norm.forward(x, vector, vector, 1e-5, stream, out=out)

    def norm_backward(self, *, residual: bool) -> Callable[[], Any]:
        x, dy, dx = (self.normal(self.tokens, self.d) for _ in range(3))
        vector, mean, rstd = self.normal(self.d), *(self.normal(self.tokens, dtype=torch.float32) for _ in range(2))
        residual_grad = dy if residual else None
        return lambda: layer_norm.backward(dy, x, vector, mean, rstd, residual_grad=residual_grad, dx=dx)

    def gelu(self, *, again: bool) -> Callable[[], Any]:
        """again: where activations are computed again in the backward, attention's output is copied beside."""
        packed, dpacked = (self.normal(self.tokens, self.packed_width) for _ in range(2))
        mixed, dmixed = (self.normal(self.tokens, self.mixed_width) for _ in range(2))
        u, du, g, dg = (x[:, -self.wide :] for x in (packed, dpacked, mixed, dmixed))
        o = self.normal(self.tokens, self.d)

        def run() -> None:
            bias_gelu.forward(u, None, out=g, carry=(o, mixed[:, : self.d]) if again else None)
            carry = (o, dmixed[:, : self.d]) if again else None
            bias_gelu.backward(dg, u, None, dx=du, activation=dg if again else None, carry=carry)

        return run

    def gate(self) -> Callable[[], Any]:
        """On the halves of one packed projection."""
        gate_up, dgate_up = (self.normal(self.tokens, 2 * self.wide) for _ in range(2))
        (gate, up), (dgate, dup) = gate_up.chunk(2, 1), dgate_up.chunk(2, 1)
        out = self.normal(self.tokens, self.wide)

        def run() -> None:
            gated_activation.forward(gate, up, out=out)
            gated_activation.backward(out, gate, up, dgate=dgate, dup=dup)

        return run

    def loss(self, rows: int, *, need_grad: bool) -> Callable[[], Any]:
        vocabulary = self.shape.vocabulary
        buffer = self.normal(rows, -(-vocabulary // 64) * 64)
        labels = torch.randint(vocabulary, (rows,), device=self.device)
        bias, scale = self.normal(vocabulary), torch.ones((), device=self.device)
        dbias = torch.zeros(vocabulary, device=self.device) if need_grad else None
        given: dict[str, Any] = {"objective": Objective(), "scale": scale, "need_grad": need_grad, "dbias": dbias}
        return lambda: linear_cross_entropy.cross_entropy_(buffer[:, :vocabulary], labels, bias, **given)

    def loss_on_chip(self) -> Callable[[], Any]:
        """What `keep_logits_on_chip` computes in place of logits and `loss`, where no gradient is wanted."""
        hidden, weight = self.normal(self.tokens, self.d), self.normal(self.shape.vocabulary, self.d)
        labels = torch.randint(self.shape.vocabulary, (self.tokens,), device=self.device)
        bias = self.normal(self.shape.vocabulary)
        return lambda: linear_cross_entropy.linear_losses(hidden, weight, bias, labels, Objective())

    def adam(self, gradients: torch.dtype) -> Callable[[], Any]:
        n = adam.MANY
        weights, grads = [self.normal(n)], [self.normal(n, dtype=gradients)]
        exp_avgs, exp_avg_sqs = ([torch.zeros(n, device=self.device)] for _ in range(2))
        masters = [weights[0].float()] if self.dtype.itemsize == 2 else None
        one, found = torch.ones((), device=self.device), torch.zeros((), device=self.device)
        options = AdamOptions(one, 1e-4, (0.9, 0.98), 1e-7, 0.1, True, True, one, found, found)
        lists = AdamLists(weights, grads, exp_avgs, exp_avg_sqs, masters)

        def run() -> None:
            adam.step_(lists, options)
            adam.grad_norm_squared(grads)

        return run

    def muon(self) -> Callable[[], Any]:
        """The symmetric products of an iteration of Muon, in bf16 with a model in 16 bits: of q, k, v and dense, and of
        fc1 and fc2, once each. They have a small share of the seconds on purpose: most runs step by AdamW."""
        dtype = torch.bfloat16 if self.dtype.itemsize == 2 else self.dtype
        matrices = [self.normal(*sorted((self.d, other)), dtype=dtype) for other in (self.d, self.wide)]

        def run() -> None:
            for x in matrices:
                muon.polynomial(x, -4.775, 2.0315)

        return run


def every(shape: Shape, dtypes: list[torch.dtype], device: torch.device, ops: tuple[str, ...]) -> Iterator[Call]:
    """The calls of `ops` in each dtype; all ops where none are named."""
    for dtype in dtypes:
        yield from (call for call in calls(shape, dtype, device) if not ops or call.op in ops)

"""torch.export with a dynamic batch and sequence: each op is one node, and results equal eager mode's at any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from phi_fast.kernels import (
    apply_rotary_,
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    parallel_block,
    rotary_table,
)

WIDTH, HEADS, LONGEST, CLASSES = 16, 2, 32, 9


class Module(nn.Module):
    """An op, with parameters that suit any of the ops."""

    def __init__(self, op: Callable[..., object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.matrix_in, self.bias_in = nn.Parameter(torch.randn(5 * WIDTH, WIDTH)), nn.Parameter(torch.randn(5 * WIDTH))
        self.matrix_out = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))
        cos, sin = rotary_table(LONGEST, WIDTH // HEADS)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> object:
        return self.op(self, x) if ends is None else self.op(self, x, ends)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1))


def block(m: Module, x: Tensor, recompute: str = "norm_gelu") -> Tensor:
    vectors, matrices = (m.vector, m.vector), (m.matrix_in, m.bias_in, m.matrix_out)
    return parallel_block(x, *vectors, *matrices, *vectors, m.cos, m.sin, num_heads=HEADS, recompute=recompute)


def loss(m: Module, x: Tensor, reduction: str = "mean") -> Tensor:
    return linear_cross_entropy(x, m.head, None, x.argmax(-1) % CLASSES, reduction=reduction)


def model(m: Module, x: Tensor) -> Tensor:
    """Runs all ops, one after the other."""
    h, x = layer_norm(x, m.vector, None, residual=bias_gelu(x, m.vector))
    q, k = apply_rotary_(heads(h * 1), heads(h * 2), m.cos, m.sin)
    return loss(m, block(m, x + attention(q, k, heads(h)).flatten(2)))


OPS: dict[str, Callable[..., object]] = {
    "layer_norm": lambda m, x: layer_norm(x, m.vector, m.vector),
    "layer_norm, residual": lambda m, x: layer_norm(x, m.vector, None, residual=2 * x),
    "bias_gelu": lambda m, x: bias_gelu(x, m.vector),
    "gated_activation": lambda m, x: gated_activation(x, 2 * x),
    "apply_rotary_": lambda m, x: apply_rotary_(heads(x * 1), None, m.cos, m.sin)[0],
    "apply_rotary_, interleaved, at an offset": lambda m, x: apply_rotary_(
        heads(x * 1), None, m.cos, m.sin, offset=3, interleaved=True
    )[0],
    "apply_rotary_, positions": lambda m, x: apply_rotary_(
        heads(x * 1), heads(2 * x), m.cos, m.sin, positions=x.argmax(-1)
    ),
    "attention": lambda m, x: attention(*[heads(x)] * 3),
    "attention, window and rotary": lambda m, x: attention(*[heads(x)] * 3, window=(3, 0), cos=m.cos, sin=m.sin),
    "linear_cross_entropy": loss,
    "linear_cross_entropy, rows": lambda m, x: loss(m, x, "none"),
    "parallel_block": block,
    "parallel_block, recompute all": lambda m, x: block(m, x, "all"),
    "all together": model,
}
NODES = {"apply_rotary_": "rotary", "linear_cross_entropy, rows": "linear_cross_entropy_rows"}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", OPS)
def test_a_dynamic_batch_and_sequence(name: str) -> None:
    module = Module(OPS[name])
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=LONGEST - 3)}
    program = torch.export.export(module, (draw(3, 7, WIDTH),), dynamic_shapes=(sizes,))
    kind = NODES.get(name, name.split(",")[0].removesuffix("_").removeprefix("apply_"))
    nodes = {str(node.target) for node in program.graph.nodes}
    assert name == "all together" or f"phi_fast.{kind}.default" in nodes
    exported = program.module()
    for batch, sequence in ((5, 4), (2, 29), (1, 1)):
        x = draw(batch, sequence, WIDTH)
        torch.testing.assert_close(exported(x), module(x))


def test_documents_of_any_number_and_length() -> None:
    def packed(m: Module, x: Tensor, ends: Tensor) -> Tensor:
        q, k = apply_rotary_(heads(x * 1), heads(x * 2), m.cos, m.sin, cu_seqlens=ends)
        return attention(q, k, heads(x), cu_seqlens=ends)

    module, example = Module(packed), torch.tensor([0, 3, 9], dtype=torch.int32)
    sizes = ({1: Dim("sequence", max=LONGEST)}, {0: Dim("ends")})
    exported = torch.export.export(module, (draw(1, 9, WIDTH), example), dynamic_shapes=sizes).module()
    for ends in ([0, 12], [0, 5, 6, 6, 20]):
        x, documents = draw(1, ends[-1], WIDTH), torch.tensor(ends, dtype=torch.int32)
        torch.testing.assert_close(exported(x, documents), module(x, documents))


def test_one_compiled_graph_trains_at_any_batch() -> None:
    module = Module(model)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, sequence in ((3, 7), (5, 4), (2, 29)):
        x = draw(batch, sequence, WIDTH)
        results = []
        for run in (module, compiled):
            module.zero_grad()
            run(x).backward()
            results.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*results)

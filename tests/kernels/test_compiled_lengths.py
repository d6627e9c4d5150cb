"""One compiled graph works for any length: ten lengths need at most two compilations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from phi_fast.kernels import (
    apply_rotary_,
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    rotary_table,
)

VECTOR, HEAD = torch.randn(16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
COS, SIN = rotary_table(64, 16)

OPS: dict[str, Callable[[Tensor], object]] = {
    "layer_norm": lambda x: layer_norm(x, VECTOR, VECTOR),
    "layer_norm, residual": lambda x: layer_norm(x, VECTOR, None, residual=x),
    "bias_gelu": lambda x: bias_gelu(x, VECTOR),
    "gated_activation": lambda x: gated_activation(x, x + 1),
    "gated_activation, halves": lambda x: gated_activation(x),
    "attention": lambda x: attention(*[x.unflatten(-1, (2, 8))] * 3),
    "apply_rotary_": lambda x: apply_rotary_(x.clone()[:, :, None], None, COS, SIN)[0],
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, HEAD, None, x.argmax(-1) % 9),
}


@pytest.mark.parametrize("name", OPS)
def test_ten_lengths_are_compiled_at_most_twice(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(OPS[name], backend=counter)
    for length in range(3, 13):
        compiled(torch.randn(2, length, 16))
    assert counter.frame_count <= 2

"""Public ops on every kind of tensor: `python tensor_kinds.py` prints "op/kind" and then the outcome, as lines of JSON.

An op that takes the address of a tensor without memory ends the process. The arguments are "op/kind" pairs to skip:
`test_tensor_kinds.py` starts the program again after each crash.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from phi_fast.kernels import (
    apply_rotary_,
    attention,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    parallel_block,
    rms_norm,
)

SEQUENCE, HEADS, D = 4, 2, 8
Op = Callable[..., Tensor]


@dataclass
class Case:
    op: Op
    """A function of the tensors in `inputs`, by phi_fast."""
    plain: Op
    """The same function by torch's public functions alone."""
    inputs: tuple[Tensor, ...]


def _layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(layer_norm(x, weight, bias, residual=residual), -1)


def _rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(rms_norm(x, weight, residual=residual), -1)


def _plain_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((F.rms_norm(x + residual, (D,), weight, 1e-6), x + residual), -1)


def _plain_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat((F.layer_norm(x + residual, (D,), weight, bias), x + residual), -1)


def _table() -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(SEQUENCE).float(), torch.tensor([1.0, 0.1]))
    return angle.cos(), angle.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, rest = x.split((2, 2, x.shape[-1] - 4), -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def _rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_(q * 1, None, cos, sin)[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention(q, k, v, cos=cos, sin=sin)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in (_turn(q, cos, sin), _turn(k, cos, sin), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3)


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, bias, torch.tensor([1, 0, 4, 2], device="cpu").to(hidden.device))


def _plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), torch.tensor([1, 0, 4, 2]))


def _block(*inputs: Tensor) -> Tensor:
    return parallel_block(*inputs, num_heads=HEADS)


def _plain_block(x: Tensor, *parameters: Tensor) -> Tensor:
    norm_weight, norm_bias, in_weight, in_bias, out_weight, bias_attention, bias_mlp, cos, sin = parameters
    h = F.linear(F.layer_norm(x, (D,), norm_weight, norm_bias), in_weight, in_bias)
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in h[..., : 3 * D].chunk(3, -1))
    mixed = torch.cat(
        (_plain_attention(q, k, v, cos, sin).flatten(-2), F.gelu(h[..., 3 * D :], approximate="tanh")), -1
    )
    return x + F.linear(mixed, out_weight) + bias_attention + bias_mlp


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    draw, table = torch.randn, _table()
    rows, heads, m = (2, SEQUENCE, D), (1, SEQUENCE, HEADS, D), 16
    vectors = (draw(D), draw(D))
    weights = (draw(3 * D + m, D), draw(3 * D + m), draw(D, D + m))
    biased_gelu = lambda x, b: F.gelu(x + b, approximate="tanh")  # noqa: E731
    return {
        "layer_norm": Case(_layer_norm, _plain_layer_norm, (draw(rows), draw(rows), *vectors)),
        "bias_gelu": Case(lambda x, b: bias_gelu(x, b), biased_gelu, (draw(rows), draw(D))),
        "gated_activation": Case(
            lambda gate, up: gated_activation(gate, up), lambda gate, up: F.silu(gate) * up, (draw(rows), draw(rows))
        ),
        "apply_rotary_": Case(_rotary, _turn, (draw(heads), *table)),
        "attention": Case(_attention, _plain_attention, (draw(heads), draw(heads), draw(heads), *table)),
        "linear_cross_entropy": Case(_loss, _plain_loss, (draw(4, D), draw(5, D), draw(5))),
        "parallel_block": Case(_block, _plain_block, (draw(rows), *vectors, *weights, *vectors, *table)),
        "rms_norm": Case(_rms_norm, _plain_rms_norm, (draw(rows), draw(rows), vectors[0])),
    }


class Named(torch.Tensor):
    """A subclass that has memory but no dispatch of its own."""


class Wrapper(torch.Tensor):
    """A tensor that wraps another one and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        return tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


class Lying(Wrapper):
    """A wrapper whose dispatch passes the wrapper itself to the kernel."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


class Holder(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.op = case.op
        self.x, *others = case.inputs
        self.others = nn.ParameterList(others)

    def forward(self) -> Tensor:
        return self.op(self.x, *self.others)


def same(case: Case, result: Any, expected: Any) -> str:
    """Checks the values; returns "right"."""
    for a, b in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return "right"


def shape(case: Case, result: Tensor) -> str:
    expected = case.plain(*case.inputs)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype), (result.shape, expected.shape)
    return "right shape"


def mapped(change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Case], str]:
    """A run whose inputs are the kind of tensor that `change` makes from plain ones of the same values."""
    return lambda case: same(case, back(case.op(*map(change, case.inputs))), case.plain(*case.inputs))


def negative(x: Tensor) -> Tensor:
    """A view whose memory holds -x; torch negates the values when it reads them."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def last(change: Callable[[Tensor], Tensor]) -> Callable[[Case], str]:
    """Like `mapped`, for the last input alone: torch's own ops would end the process on these tensors."""
    return lambda case: same(case, case.op(*case.inputs[:-1], change(case.inputs[-1])), case.plain(*case.inputs))


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def dtensor(x: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])


def inference(case: Case) -> str:
    with torch.inference_mode():
        return same(case, case.op(*(x.clone() for x in case.inputs)), case.plain(*case.inputs))


def fake(case: Case) -> str:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return shape(case, case.op(*case.inputs))


def fake_inputs(case: Case) -> str:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return shape(case, case.op(*map(mode.from_tensor, case.inputs)))


def fake_training(case: Case) -> str:
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x).requires_grad_() for x in case.inputs]
        case.op(*inputs).sum().backward()
        assert all(x.grad.shape == x.shape for x in inputs if x.grad is not None) and inputs[0].grad is not None
    return "right shape"


def traced(trace: Callable[[Op, tuple[Tensor, ...]], Op]) -> Callable[[Case], str]:
    """A run that records a graph on some values and runs it on others."""

    def run(case: Case) -> str:
        graph = trace(case.op, case.inputs)
        first = (0.5 * case.inputs[0], *case.inputs[1:])
        same(case, graph(*case.inputs), case.plain(*case.inputs))
        return same(case, graph(*first), case.plain(*first))

    return run


def gradient_graph(case: Case) -> str:
    """A run of make_fx over the backward pass of a forward that ran before."""
    x = case.inputs[0].clone().requires_grad_()
    out, expected = case.op(x, *case.inputs[1:]), case.plain(x, *case.inputs[1:])
    generator = torch.Generator().manual_seed(0)  # the same for each case, whichever ran before
    grads = [torch.randn(out.shape, generator=generator) for _ in range(2)]

    def backward(function_out: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda dout: torch.autograd.grad(function_out, x, dout, retain_graph=True)

    graph = make_fx(backward(out))(grads[0])
    return same(case, graph(grads[1]), backward(expected)(grads[1]))


def vmapped(case: Case) -> str:
    first = torch.stack((case.inputs[0], 2 * case.inputs[0]))
    axes = (0, *[None] * (len(case.inputs) - 1))
    expected = torch.stack([case.plain(x, *case.inputs[1:]) for x in first])
    return same(case, torch.vmap(case.op, axes)(first, *case.inputs[1:]), expected)


def batched_gradients(case: Case) -> str:
    results = []
    for function in (case.op, case.plain):
        x = case.inputs[0].clone().requires_grad_()
        out = function(x, *case.inputs[1:])
        grads = torch.stack((torch.ones_like(out), 2 * torch.ones_like(out)))
        results.append(torch.autograd.grad(out, x, grads, is_grads_batched=True))
    return same(case, *results)


def gradient_of(change: Callable[[Tensor], Tensor]) -> Callable[[Case], str]:
    """A run with a plain forward and an incoming gradient of another kind."""

    def run(case: Case) -> str:
        x = case.inputs[0].clone().requires_grad_()
        out = case.op(x, *case.inputs[1:])
        return same(case, *torch.autograd.grad(out, x, change(torch.ones_like(out))), case.inputs[0])

    return run


def functional_grad(case: Case) -> str:
    results = [
        torch.func.grad(lambda x, f=f: f(x, *case.inputs[1:]).sum())(case.inputs[0]) for f in (case.op, case.plain)
    ]
    return same(case, *results)


def forward_mode(case: Case) -> str:
    def tangent(function: Op) -> Tensor:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(case.inputs[0], torch.ones_like(case.inputs[0]))
            return forward_ad.unpack_dual(function(x, *case.inputs[1:])).tangent

    return same(case, tangent(case.op), tangent(case.plain))


def functional_jvp(case: Case) -> str:
    x = case.inputs[0]
    results = [torch.func.jvp(lambda x, f=f: f(x, *case.inputs[1:]), (x,), (x,)) for f in (case.op, case.plain)]
    return same(case, *results)


def functional_call(case: Case) -> str:
    module = Holder(case)
    others = {f"others.{i}": 1.5 * x for i, x in enumerate(case.inputs[1:])}
    return same(case, torch.func.functional_call(module, others), case.plain(case.inputs[0], *others.values()))


def default_device(case: Case) -> str:
    with torch.device("meta"):
        result = case.op(*case.inputs)
    return same(case, result, case.plain(*case.inputs))


def nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nested.nested_tensor([x, x], layout=layout)


FX: dict[str, Any] = {"_allow_non_fake_inputs": True}
KINDS: dict[str, Callable[[Case], str]] = {
    "plain": mapped(lambda x: x),
    "Parameter": mapped(nn.Parameter),
    "Buffer": mapped(nn.Buffer),
    "inference mode": inference,
    "subclass without dispatch": mapped(lambda x: x.as_subclass(Named), lambda x: x.as_subclass(Tensor)),
    "negative view": mapped(negative),
    "wrapper subclass": mapped(Wrapper, lambda x: x.inner),
    "wrapper that hands itself on": last(Lying),
    "fake mode": fake,
    "fake tensors": fake_inputs,
    "fake training": fake_training,
    "meta": lambda case: shape(case, case.op(*(x.to("meta") for x in case.inputs))),
    "default device meta": default_device,
    "make_fx real": traced(lambda op, inputs: make_fx(op)(*inputs)),
    "make_fx fake": traced(lambda op, inputs: make_fx(op, tracing_mode="fake", **FX)(*inputs)),
    "make_fx symbolic": traced(lambda op, inputs: make_fx(op, tracing_mode="symbolic", **FX)(*inputs)),
    "make_fx pre_dispatch": traced(lambda op, inputs: make_fx(op, pre_dispatch=True)(*inputs)),
    "make_fx of a backward": gradient_graph,
    "jit.trace": traced(lambda op, inputs: torch.jit.trace(op, inputs, check_trace=False)),
    "vmap": vmapped,
    "batched gradients": batched_gradients,
    "functional_call": functional_call,
    "func.grad": functional_grad,
    "func.jvp": functional_jvp,
    "forward-mode AD": forward_mode,
    "DTensor": mapped(dtensor),
    "DTensor gradient": gradient_of(dtensor),
    "fake gradient": gradient_of(lambda x: FakeTensorMode().from_tensor(x)),
    "sparse": mapped(lambda x: x.to_sparse()),
    "mkldnn": mapped(lambda x: x.to_mkldnn()),
    "nested": mapped(nested(torch.strided)),
    "jagged": mapped(nested(torch.jagged)),
    "freed storage": last(freed),
    "numpy": lambda case: str(case.op(*(numpy.asarray(x) for x in case.inputs))),
}


def main(passed_over: list[str]) -> None:
    for name, case in cases().items():
        for kind, run in KINDS.items():
            pair = f"{name}/{kind}"
            if pair in passed_over:
                continue
            print(json.dumps(pair), flush=True)
            try:
                outcome = run(case)
            except Exception as error:  # any error is reported to the test
                outcome = f"{type(error).__name__}: {error}"
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

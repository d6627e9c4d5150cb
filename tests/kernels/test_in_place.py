"""autograd knows what an op writes in place: a backward pass that needs the old values raises an error, as in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import backends
from torch import Tensor

from phi_fast.kernels import (
    FusedAdam,
    apply_rotary_,
    attention,
    backend,
    bias_gelu,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    parallel_block,
    rotary_table,
)
from phi_fast.kernels.adam import adam_step_, grad_norm_squared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STALE = "modified by an inplace operation"


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE).requires_grad_(grad)


def lists(count: int) -> list[list[Tensor]]:
    return [[draw(5, grad=False).abs(), draw(2, 3, grad=False).abs()] for _ in range(count)]


@pytest.fixture(params=backends(DEVICE))
def backend_name(request: pytest.FixtureRequest):
    with backend.use(request.param):
        yield request.param


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adam(dtype: torch.dtype) -> None:
    w = draw(4).detach().to(dtype).requires_grad_()
    optimizer = FusedAdam([w], master_weights=True)
    w.square().sum().backward()
    optimizer.step()
    old = [tensor.clone().requires_grad_() for tensor in optimizer.state[w].values()]
    loss = w.square().sum()
    states = [state.mul(leaf).sum() for state, leaf in zip(optimizer.state[w].values(), old, strict=True)]
    grads_before = w.grad._version
    optimizer.step()
    for stale in (loss, *states):
        with pytest.raises(RuntimeError, match=STALE):
            stale.backward()
    assert w.grad._version == grads_before, "gradients are read, not written"


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("compiled", [False, True])
def test_adam_step_(compiled: bool) -> None:
    tensors = lists(5)
    step = torch.zeros((), device=DEVICE)
    nonfinite = torch.zeros((), device=DEVICE)
    written = [*tensors[0], *tensors[2], *tensors[3], *tensors[4], step, nonfinite]
    leaf = torch.ones((), requires_grad=True, device=DEVICE)
    stale = [(tensor * leaf).sum() for tensor in written]  # the leaf's gradient needs the tensor's value
    versions = [grad._version for grad in tensors[1]]
    run = torch.compile(adam_step_, backend="aot_eager") if compiled else adam_step_
    run(*tensors, step=step, lr=0.1, nonfinite=nonfinite)
    for loss in stale:
        with pytest.raises(RuntimeError, match=STALE):
            loss.backward()
    assert [grad._version for grad in tensors[1]] == versions


@pytest.mark.usefixtures("backend_name")
def test_adam_step_on_views_is_seen_by_their_base() -> None:
    flat, (grads, m, v) = draw(8, grad=False), ([draw(4, grad=False)] for _ in range(3))
    leaf = torch.ones((), requires_grad=True, device=DEVICE)
    stale = (flat * leaf).sum()
    adam_step_([flat[2:6]], grads, m, [v[0].square()], step=torch.zeros((), device=DEVICE), lr=0.1)
    with pytest.raises(RuntimeError, match=STALE):
        stale.backward()


@pytest.mark.usefixtures("backend_name")
def test_adam_steps_tensors_of_inference_mode() -> None:
    """Such tensors have no version counter, and must be accepted all the same."""
    with torch.inference_mode():
        tensors, step = lists(4), torch.zeros((), device=DEVICE)
    before = tensors[0][0].clone()
    with torch.inference_mode():
        adam_step_(*tensors, step=step, lr=0.1)
    assert step == 1 and not torch.equal(tensors[0][0], before)


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_apply_rotary_(grad: bool, compiled: bool) -> None:
    cos, sin = rotary_table(8, 8, device=DEVICE)
    leaves = [draw(1, 4, 2, 16, grad=grad), draw(1, 4, 1, 16, grad=grad)]
    q, k = (leaf * 1 for leaf in leaves)
    stale = [(q * draw(16)).sum(), (k * draw(16)).sum()]
    run = torch.compile(apply_rotary_, backend="aot_eager") if compiled else apply_rotary_
    run(q, k, cos, sin)
    for loss in stale:
        with pytest.raises(RuntimeError, match=STALE):
            loss.backward()


def norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    h, summed = layer_norm(x, weight, bias, 1e-5, residual=residual)
    return h * summed


def rotated_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, **dict(zip(("cos", "sin"), rotary_table(4, 32, device=DEVICE), strict=True)))


def block(*tensors: Tensor) -> Tensor:
    return parallel_block(*tensors, *rotary_table(4, 32, device=DEVICE), num_heads=1)


def head(hidden: Tensor, weight: Tensor, bias: Tensor, reduction: str = "mean") -> Tensor:
    labels = torch.tensor([1, 0, 2], device=DEVICE)
    return linear_cross_entropy(hidden, weight, bias, labels, softcap=9.0, reduction=reduction, chunk_size=2)


def head_by_row(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return head(hidden, weight, bias, "none")


OUT_OF_PLACE: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "layer_norm": (norm, [draw(3, 16), draw(16), draw(16), draw(3, 16)]),
    "bias_gelu": (bias_gelu, [draw(3, 16), draw(16)]),
    "gated_activation": (gated_activation, [draw(3, 16), draw(3, 16)]),
    "gated_activation of halves": (gated_activation, [draw(3, 16)]),
    "attention": (rotated_attention, [draw(1, 4, 2, 64), draw(1, 4, 1, 64), draw(1, 4, 1, 64)]),
    "linear_cross_entropy": (head, [draw(3, 8), draw(5, 8), draw(5)]),
    "linear_cross_entropy by row": (head_by_row, [draw(3, 8), draw(5, 8), draw(5)]),
    "parallel_block": (
        block,
        [draw(1, 4, 64), draw(64), draw(64), draw(224, 64), draw(224), draw(64, 96), draw(64), draw(64)],
    ),
}


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("op", OUT_OF_PLACE)
def test_other_ops_write_into_nothing_of_their_users(op: str) -> None:
    """Inputs and the incoming gradient stay unchanged in forward, backward, and a second backward of the same graph."""
    function, inputs = OUT_OF_PLACE[op]
    out = function(*inputs)
    dout = torch.randn_like(out)
    visible = [*inputs, out, dout]
    before = [tensor.detach().clone() for tensor in visible]
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(out, inputs, dout)
    for tensor, copy in zip((*visible, *first, *second), (*before, *kept, *kept), strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.usefixtures("backend_name")
def test_the_gradient_norm_writes_into_nothing() -> None:
    grad = draw(7, grad=False)
    before = grad.clone()
    grad_norm_squared([grad])
    assert torch.equal(grad, before) and grad._version == 0

"""parallel_block with LoRA adapters against float64, beside a plain block whose every Linear has PEFT's two more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, double, gradients
from test_parallel_block import BACKENDS, LEVELS, ROTARY, attend, make, upstream
from torch import Tensor
from torch._subclasses import FakeTensorMode

from phi_fast.config import LORA_TARGETS
from phi_fast.kernels import fuse_rotary, parallel_block, rotary_table, use
from phi_fast.kernels.parallel_block_adapters import PARTS, Adapters

RANK, SCALE = 3, 1.5
CHOICES = (PARTS, ("q_proj", "v_proj"), ("fc2",), ("dense", "k_proj"))


def inputs_of(parts: tuple[str, ...], dtype: torch.dtype, device: str, mlp: int = 96) -> dict[str, Tensor]:
    tensors = make(2, 9, 2, mlp, dtype, device)
    d = tensors["x"].shape[-1]
    generator = torch.Generator().manual_seed(7)
    for part in parts:
        a = torch.randn(RANK, mlp if part == "fc2" else d, generator=generator) * d**-0.5
        b = 0.3 * torch.randn(mlp if part == "fc1" else d, RANK, generator=generator)
        tensors |= {f"{part}.a": a.to(device, dtype), f"{part}.b": b.to(device, dtype)}
    return tensors


def ours(recompute: str = "norm_gelu"):
    def block(x: Tensor, **given: Tensor) -> Tensor:
        parts = tuple(name[:-2] for name in given if name.endswith(".a"))
        a, b = (tuple(given.pop(f"{part}.{which}") for part in parts) for which in "ab")
        cos, sin = rotary_table(x.shape[1] + 3, 32, device=x.device)
        more = {"num_heads": 2, "recompute": recompute, "adapters": Adapters(parts, SCALE, a, b)}
        return parallel_block(x, **given, cos=cos, sin=sin, **more)

    return block


def plain(x: Tensor, **p: Tensor) -> Tensor:
    batch, sequence, d = x.shape
    h = F.layer_norm(x, (d,), p["norm_weight"], p["norm_bias"])
    sizes = [d, d, d, p["in_bias"].shape[0] - 3 * d]
    weights = dict(zip(PARTS[:4], p["in_weight"].split(sizes), strict=True))
    weights |= dict(zip(PARTS[4:], p["out_weight"].split((d, sizes[3]), 1), strict=True))
    biases = dict(zip(PARTS[:4], p["in_bias"].split(sizes), strict=True))
    biases |= {"dense": p["out_bias_attention"], "fc2": p["out_bias_mlp"]}

    def linear(part: str, inside: Tensor) -> Tensor:
        result = F.linear(inside, weights[part], biases[part])
        if f"{part}.a" not in p:
            return result
        return result + F.linear(F.linear(inside, p[f"{part}.a"]), p[f"{part}.b"]) * SCALE

    q, k, v = (linear(part, h).view(batch, sequence, -1, 64).transpose(1, 2) for part in PARTS[:3])
    o = attend(q, k, v)
    return linear("dense", o) + linear("fc2", F.gelu(linear("fc1", h), approximate="tanh")) + x


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("choice", [*BACKENDS, *ROTARY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_forward_and_all_gradients(choice, dtype, device):
    inputs = inputs_of(PARTS, dtype, device)
    dout = upstream(inputs["x"])
    name, inside = ROTARY.get(choice, (choice, None))
    with use(name), fuse_rotary(inside):
        actual = gradients(ours(), inputs, dout)
    expected, exact = gradients(plain, inputs, dout), gradients(plain, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("parts", CHOICES)
def test_frozen_weights_have_no_gradient_and_adapters_the_right_one(parts, level, device):
    """In float64; the block's input has a gradient, or, as in the first layer, has none."""
    with use("reference"):
        for needs_x in (True, False):
            tensors = double(inputs_of(parts, torch.float32, device))
            results = []
            for block in (ours(level), plain):
                given = {name: tensor.clone() for name, tensor in tensors.items()}
                wanted = {n: t.requires_grad_() for n, t in given.items() if "." in n or (needs_x and n == "x")}
                out = block(**given)
                results.append((out, torch.autograd.grad(out, list(wanted.values()), upstream(out))))
                if block is not plain:
                    without = torch.no_grad()(block)(**given)
                    torch.testing.assert_close(without, out, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_a_block_without_gradients_of_weights_makes_no_product_for_them(device):
    """Only the adapters' small gradients are new tensors with a dimension of the weights."""
    given = inputs_of(("q_proj",), torch.float32, device)
    for name, tensor in given.items():
        tensor.requires_grad_("." in name or name == "x")
    ours()(**given).sum().backward()
    assert {name for name, tensor in given.items() if tensor.grad is not None} == {"x", "q_proj.a", "q_proj.b"}


def test_autocast_casts_the_adapters_as_it_does_the_weights(device):
    inputs = inputs_of(PARTS, torch.float32, device)
    inputs["x"] = inputs["x"].bfloat16()
    with torch.autocast(device, torch.bfloat16):
        found = ours()(**inputs)
    lowered = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    assert torch.equal(found, ours()(**lowered))


def wrong(change: str, device: str) -> tuple[dict[str, Tensor], Adapters]:
    given = inputs_of(("q_proj", "fc2"), torch.float32, device)
    parts = ("q_proj", "fc2")
    a, b = ([given.pop(f"{part}.{which}") for part in parts] for which in "ab")
    if change == "part":
        parts = ("q_proj", "fc3")
    if change == "twice":
        parts = ("q_proj", "q_proj")
    if change == "missing":
        b.pop()
    if change == "shape":
        a[1] = a[1][:, :-1]
    if change == "rank":
        b[0] = b[0][:, :-1]
    if change == "dtype":
        b[0] = b[0].double()
    return given, Adapters(parts, SCALE, tuple(a), tuple(b))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("part", ValueError, "fc3.*expected each at most once, from q_proj, k_proj"),
        ("twice", ValueError, "expected each at most once"),
        ("missing", ValueError, "2 parts, 2 A and 1 B"),
        ("shape", ValueError, r"adapters.a of fc2 has shape \(3, 95\); expected \(rank, 96\)"),
        ("rank", ValueError, r"adapters.b of q_proj has shape \(128, 2\); expected \(128, 3\)"),
        ("dtype", TypeError, "adapters.b of q_proj is torch.float64 and x is torch.float32"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, error, message, device):
    given, adapters = wrong(change, device)
    cos, sin = rotary_table(16, 32, device=torch.device(device))
    with pytest.raises(error, match=message):
        parallel_block(**given, cos=cos, sin=sin, num_heads=2, adapters=adapters)


def test_where_torch_must_see_one_op_adapters_are_refused(device):
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(NotImplementedError, match="add them to the weights"),
    ):
        ours()(**inputs_of(PARTS, torch.float32, device))


def test_the_parts_have_the_names_of_the_targets():
    assert PARTS == LORA_TARGETS

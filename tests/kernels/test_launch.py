"""A Triton launch and the GPU it runs on."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.triton import adam, attention, bias_gelu, layer_norm, linear_cross_entropy, rotary
from phi_fast.kernels.triton.common import Launch, recording

LIMITS = (2**31 - 1, 65535, 65535)
"""Programs along each axis of a grid: CUDA C++ programming guide, "Compute Capabilities"."""


def test_runs_on_the_tensors_gpu_whichever_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            events.append(self.device)

        def __exit__(self, *_: object) -> None:
            events.append("left")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    with FakeTensorMode():  # which allocates where there is a GPU: of the first, as there may be no other
        tensor = torch.empty(4, device="cuda:0")
    kernel = {(2,): lambda **arguments: events.append(arguments["n"])}
    Launch(kernel, (2,), {"absent": None, "n": 4, "x": tensor}, {})()
    assert events == [torch.device("cuda", 0), 4, "left"]
    Launch(kernel, (2,), {"x": torch.empty(4), "n": 5}, {})()
    assert events[3:] == [5]


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(batch: int, sequence: int, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k = (
        empty(batch, sequence, heads, head_dim, dtype=dtype),
        empty(batch, sequence, key_heads, head_dim, dtype=dtype),
    )
    options = AttentionOptions(1.0, causal=False)
    out, lse = attention.forward(q, k, k, options)
    attention.backward(out, q, k, k, out, lse, options, dq=q, dk=k, dv=k)


def activate(rows: int, n: int, width: int = 0) -> None:
    x = empty(rows, n)
    carry = (empty(rows, width), empty(rows, width)) if width else None
    bias_gelu.forward(x, None, carry=carry)
    bias_gelu.backward(x, x, None, carry=carry)


def normalise(rows: int, d: int) -> None:
    x, vector, statistics = empty(rows, d), empty(d), empty(rows, dtype=torch.float32)
    layer_norm.forward(x, vector, vector, 1e-5)
    layer_norm.backward(x, x, vector, statistics, statistics)


def cross_entropy(rows: int, vocabulary: int) -> None:
    scalar, sums = empty(dtype=torch.float32), empty(vocabulary, dtype=torch.float32)
    logits, labels = empty(rows, vocabulary), empty(rows, dtype=torch.int64)
    linear_cross_entropy.cross_entropy_(logits, labels, objective=Objective(), scale=scalar, need_grad=True, dbias=sums)


def turn(batch: int, sequence: int, heads: int) -> None:
    rotary.rotate_(empty(batch, sequence, heads, 4), empty(sequence, 2), empty(sequence, 2), 0)


def step(elements: int) -> None:
    x, scalar = [empty(elements, dtype=torch.float32)], empty(dtype=torch.float32)
    adam.step_(AdamLists(x, x, x, x), AdamOptions(scalar, 1.0, (0.9, 0.9), 1.0, 0.0, True))
    adam.grad_norm_squared(x)


@pytest.mark.parametrize(
    ("call", "arguments", "launches"),
    [
        (attend, (1, 1_048_561, 1, 1, 128, torch.float32), 3),  # blocks of 16 rows: 65,536
        (attend, (1, 2**30, 8, 1, 64, torch.float16), 3),
        (attend, (2**20, 1, 64, 8, 64, torch.bfloat16), 3),
        (activate, (2**31 + 5, 3), 2),
        (activate, (1, 2**30), 2),  # tiles of 512 columns
        (activate, (1, 3, 2**30), 2),
        (activate, (2**20, 2**20, 2**18), 2),
        (normalise, (2**31 - 1, 7), 2),
        (normalise, (2**20, 2**15), 3),  # wide rows: their means, and the gradients of their parts
        (cross_entropy, (2**20, 2**18), 2),
        (cross_entropy, (1, 2**30), 2),
        (turn, (2**16, 2**14, 64), 1),
        (turn, (1, 1, 2**23), 1),
        (step, (2**33 + 5,), 4),  # the last five elements are launched by themselves
    ],
)
def test_no_grid_passes_what_a_gpu_takes(call, arguments, launches) -> None:
    with recording("sm_90") as found:
        call(*arguments)
    assert len(found) == launches
    for launch in found:
        assert all(1 <= n <= most for n, most in zip(launch.grid, LIMITS[: len(launch.grid)], strict=True)), launch.grid


def test_more_rows_than_a_grid_takes_are_refused() -> None:
    with (
        recording("sm_90") as found,
        pytest.raises(ValueError, match=r"_forward needs 2147483648 programs, of 2147483647"),
    ):
        normalise(2**31, 4)
    with recording("sm_90"), pytest.raises(ValueError, match="takes rows of up to 1073741824 elements, not 1073741825"):
        activate(1, 2**30 + 1)
    assert not found

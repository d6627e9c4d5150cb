"""The optimizer step on one flat ZeRO partition: this project's fused step beside DeepSpeed's own.

Both follow the same backward pass, with fp16 weights, clipping and the overflow check, and end by writing the fp16
weights. Only `zero.step` is timed. By then DeepSpeed has accumulated the gradient in an fp32 partition; on one rank
this project omits that, and reads the gradient that autograd made.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks import timing, yardsticks
from benchmarks.harness import Results
from benchmarks.subjects import Row, Subject
from phi_fast.model.output import Output
from phi_fast.recipes import RECIPES
from phi_fast.training.distributed import World, join
from phi_fast.training.zero import Zero2

GRADIENT, STATE = 2, 4  # bytes per element: the fp16 gradient as autograd made it; master, m and v are fp32
UPDATE_BYTES = GRADIENT + 2 * 3 * STATE + 2
"""Bytes per parameter that the update moves: it reads the gradient, reads and writes master, m and v, and writes the
16-bit weight."""
BYTES = UPDATE_BYTES + GRADIENT
"""Bytes per parameter including the pass that computes the norm and finds overflows."""


class Flat(nn.Module):
    """One parameter of n elements whose gradient is `slopes` times the loss scale."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))
        self.register_buffer("slopes", torch.randn(n, generator=torch.Generator().manual_seed(0)) / n**0.5)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        return Output((self.weight * self.slopes).sum(dtype=torch.float32), None)


def contender(n: int, world: World, *, fused: bool, torch_adam: bool = False) -> Callable[[], float]:
    """A call that runs a backward pass and a step, and returns the seconds of the step."""
    recipe = RECIPES["tiny"].replace(gradient_clipping=0.5, initial_loss_scale=256.0)
    optimizer = functools.partial(torch.optim.AdamW, fused=True)
    with mock.patch("phi_fast.training.zero.FusedAdam", optimizer) if torch_adam else mock.MagicMock():
        zero = Zero2(
            Flat(n).half().to(world.device),
            recipe,
            world,
            precision="fp16",
            micro_batch_size=1,
            accumulation=1,
            fused=fused,
        )
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=world.device)

    def step() -> float:
        zero.backward(zero.loss(tokens, tokens))
        _settle(world.device)
        begin = time.perf_counter()
        outcome = zero.step(1e-4)
        _settle(world.device)
        seconds = time.perf_counter() - begin
        assert outcome is not None
        assert not outcome.skipped
        assert outcome.grad_norm == pytest.approx(1.0, abs=0.1)  # so that clipping to 0.5 binds
        return seconds

    return step


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def test_fused_step_beside_deepspeeds(full: bool, results: Results) -> None:
    n, rounds = (50_000_000, 9) if full else (100_000, 2)
    world = join("auto")
    contenders = {
        "phi_fast fused step": contender(n, world, fused=True),
        "DeepSpeed's step, torch AdamW(fused)": contender(n, world, fused=False, torch_adam=True),
        "DeepSpeed's step, phi_fast FusedAdam": contender(n, world, fused=False),
    }
    for step in contenders.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            seconds[name].append(step())
    measure, yardstick = timing.timer(world.device), yardsticks.copy(8 * n, world.device)
    copies = [measure(yardstick.run) for _ in range(rounds)]
    rows = [*(Row(name, times) for name, times in seconds.items()), Row("copy", copies, moved=yardstick.moved)]
    subject = Subject("ZeRO-2 step on a flat partition", {"parameters": n, "bytes per parameter": BYTES}, rows)
    least = BYTES * n / yardstick.moved * statistics.median(copies)
    for row in rows[:-1]:
        row.moved, row.of_bound = BYTES * n, least / statistics.median(row.seconds or [])
    results.add(subject)
    if full:
        ours, *others = contenders
        assert all(subject.ratio(name, ours) >= 2 for name in others)

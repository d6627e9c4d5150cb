"""One op under autograd, timed forward and backward: what every kernel's benchmark shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import yardsticks
from benchmarks.harness import Results, compare
from benchmarks.subjects import Contender, Subject, kind
from phi_fast.kernels import use

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Tolerance, as a share of the largest output: it shows that contenders compute the same thing, not how well
(tests/kernels shows that)."""

MOST = 2**29
"""Bytes that a copy moves at most: beyond any cache, and a row's share of the bound is by rate."""


@dataclass(frozen=True)
class Cost:
    """What one direction must move and multiply at least."""

    moved: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Op:
    """One implementation of an operation."""

    run: Callable[[], Tensor]
    """The forward, recorded. All of a subject's give one shape."""
    leaves: Sequence[Tensor]
    """What the backward gives gradients of."""
    forward: Callable[[], object] | None = None
    """Timed as the forward in place of `run`, where recording would need a copy that the op itself does not."""
    note: str = ""
    backend: tuple[str, str] | None = None
    """(op, name): this project's back end that is chosen for as long as it runs, backward too; None: whatever is."""

    def record(self) -> Tensor:
        with self._chosen():
            return self.run()

    def time_forward(self) -> object:
        with self._chosen():
            return (self.forward or self.run)()

    def backward(self, dout: Tensor) -> Callable[[], object]:
        """The backward of one recorded forward, again and again."""
        recorded: list[Tensor] = []

        def again() -> object:
            if not recorded:
                recorded.append(self.record())
            with self._chosen():
                return torch.autograd.grad(recorded[0], self.leaves, dout, retain_graph=True)

        return again

    def _chosen(self) -> AbstractContextManager:
        return use(self.backend[1], op=self.backend[0]) if self.backend else nullcontext()


def leaf(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Random numbers that want a gradient."""
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def measure(
    name: str,
    ops: Mapping[str, Op | str],
    dout: Tensor,
    results: Results,
    *,
    costs: tuple[Cost, Cost],
    config: dict[str, Any],
    full: bool,
    repeats: int = 11,
    budget: float = 4.0,
    more: tuple[Mapping[str, Contender], Mapping[str, Contender]] = ({}, {}),
) -> list[Subject]:
    """Two subjects, "NAME, forward" and "NAME, backward", each with the bounds that its cost calls for.

    costs: of the forward and the backward; (bytes, FLOPs) from which a row's share of the bound follows. more: further
    contenders a direction, which state their own cost. budget: seconds a direction.
    """
    agree({label: op.record for label, op in ops.items() if not isinstance(op, str)}, dout.dtype)
    subjects = []
    for direction, cost, others in zip(("forward", "backward"), costs, more, strict=True):
        contenders: dict[str, Contender | str] = {}
        for label, op in ops.items():
            if isinstance(op, str):
                contenders[label] = op
                continue
            run = op.backward(dout) if direction == "backward" else op.time_forward
            contenders[label] = Contender(run, cost.moved, cost.flops, op.note)
            if kind(label) == "ours":
                contenders |= {other: c for other, c in others.items() if other not in contenders}
        contenders |= bounds(cost, dout, full)
        subject = compare(
            f"{name}, {direction}",
            contenders,
            config=config | {"bytes": cost.moved, "FLOPs": cost.flops},
            repeats=repeats if full else 1,
            budget=budget if full else None,
        )
        results.add(subject)
        subjects.append(subject)
    return subjects


def bounds(cost: Cost, like: Tensor, full: bool) -> dict[str, Contender]:
    """The yardsticks of what an operation is bound by, on the device and in the dtype of `like`."""
    found = {}
    if cost.moved:
        found["copy"] = yardsticks.copy(min(cost.moved, MOST), like.device)
    if cost.flops:
        found["matrix product"] = yardsticks.product(2048 if full else 64, like.dtype, like.device)
    return found


def agree(outputs: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Raises AssertionError where a contender does not compute, in `dtype`, what the first does. A peer that cannot run
    is left to `compare`, which says why."""
    first: Tensor | None = None
    for label, output in outputs.items():
        try:
            found = output().detach()
        except Exception:
            if kind(label) == "ours":
                raise
            continue
        if first is None:
            first = found
        error = (found.float() - first.float()).abs().max() / first.float().abs().max()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"{label} is {error:.1e} of the largest output away from the first contender")

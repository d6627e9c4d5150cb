"""Timing of one op under autograd, forward and backward, for every kernel's benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import sizes, yardsticks
from benchmarks.harness import Results, compare
from benchmarks.subjects import Contender, Subject, kind
from phi_fast.kernels import use

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference, relative to the largest output. It shows that contenders compute the same function; how
accurately they do is tested in tests/kernels."""

MOST = 2**29
"""Bytes that the copy moves at most. This is larger than any cache, and a row's share of the bound uses its rate."""


@dataclass(frozen=True)
class Cost:
    """The least that one direction must move (bytes) and multiply (FLOPs)."""

    moved: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Op:
    """One implementation of an operation."""

    run: Callable[[], Tensor]
    """The forward pass, recorded by autograd. All ops of a subject give outputs of one shape."""
    leaves: Sequence[Tensor]
    """The tensors whose gradients the backward computes."""
    forward: Callable[[], object] | None = None
    """Timed as the forward instead of `run`, if recording needs a copy that the op itself does not need."""
    note: str = ""
    backend: tuple[str, str] | None = None
    """(op, name): back end of this project to use in forward and backward; None keeps the current choice."""

    def record(self) -> Tensor:
        with self._chosen():
            return self.run()

    def time_forward(self) -> object:
        with self._chosen():
            return (self.forward or self.run)()

    def backward(self, dout: Tensor) -> Callable[[], object]:
        """A call that runs the backward of one recorded forward, as often as it is called."""
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
    """Random numbers that require a gradient."""
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
    """Time two subjects, "NAME, forward" and "NAME, backward", each beside the bounds that apply to its cost.

    costs: of forward and backward, from which each row's share of the bound follows. more: further contenders for
    forward and backward, which state their own cost. budget: seconds per direction.
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
            kernels=True,
        )
        results.add(subject)
        subjects.append(subject)
    return subjects


def bounds(cost: Cost, like: Tensor, full: bool) -> dict[str, Contender]:
    """The copy and matrix product that bound an operation of this cost, on the device and in the dtype of `like`."""
    found = {}
    if cost.moved:
        found["copy"] = yardsticks.copy(min(cost.moved, MOST), like.device)
    if cost.flops:
        found["matrix product"] = yardsticks.product(sizes.PRODUCT if full else 64, like.dtype, like.device)
    return found


def agree(outputs: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Raises AssertionError if a contender's output differs from the first one's by more than the tolerance of `dtype`.
    A peer that cannot run is passed over here; `compare` reports the reason."""
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
            raise AssertionError(f"{label} differs from the first contender by {error:.1e} of the largest output")

"""Norms of weights, gradients and updates by parameter (`--log-norms`), exact though the state is partitioned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..files import write_atomically, writing
from ..json_files import Fields, read_lines
from .parameters import trained_weights
from .trouble import Trouble
from .zero import Zero2

KINDS = ("weights", "gradients", "updates")
"""What norms are taken of: weights after the step, gradients unscaled and before clipping, and the change of weights;
weights and updates are those of the fp32 master weights."""


class Segment(NamedTuple):
    """The part of a parameter that lies in this rank's flat partition of a parameter group."""

    parameter: int
    """Index into the parameters that are trained."""
    group: int
    start: int
    """First element in the partition."""
    length: int


def segments(zero: Zero2) -> list[Segment]:
    """List what this rank's partitions hold of each parameter; the padding belongs to none."""
    index = {parameter: i for i, parameter in enumerate(trained_weights(zero.model).values())}
    found = []
    for group, master in enumerate(zero.zero.single_partition_of_fp32_groups):
        first = zero.world.rank * master.numel()
        places = zip(zero.zero.round_robin_bit16_groups[group], zero.zero.round_robin_bit16_offsets[group], strict=True)
        for parameter, offset in places:
            start, end = max(offset, first), min(offset + parameter.numel(), first + master.numel())
            if start < end:
                found.append(Segment(index[parameter], group, start - first, end - start))
    return found


class NormLog:
    """Appends to `norms.jsonl`, every `every` steps, a line {"step", "weights", "gradients", "updates"}.

    Each of the three maps a parameter's name in the model to its L2 norm: float64 sums of squares over all ranks; null
    if it is not finite. During such a step the weights before it are kept, too: 4 bytes per parameter, divided by the
    number of ranks.
    """

    def __init__(self, path: Path, every: int, zero: Zero2, done: int, trouble: Trouble) -> None:
        """done: steps already taken; later lines of an existing file are dropped.

        Raises UsageError if the file cannot be read or written.
        """
        self._path, self._every, self._zero, self._trouble = path, every, zero, trouble
        self._names = list(trained_weights(zero.model))
        self._segments = segments(zero)
        if zero.world.is_main:
            with self._writing():
                _drop_after(path, done)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._path, "make room, and go on from the newest checkpoint with --resume")

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Measure the update of the weights that is made inside, if a line is due after `step`; every rank calls it."""
        if step % self._every:
            yield
            return
        masters = [master.detach() for master in self._zero.zero.single_partition_of_fp32_groups]
        before = [master.clone() for master in masters]
        gradients = self._gradients()
        yield
        weights, updates = torch.zeros_like(gradients), torch.zeros_like(gradients)
        for parameter, group, start, length in self._segments:
            now, then = (flats[group].narrow(0, start, length) for flats in (masters, before))
            weights[parameter] += sum_of_squares(now)
            updates[parameter] += sum_of_squares(now - then)
        del before
        sums = torch.stack([weights, gradients, updates])
        if self._zero.world.size > 1:
            dist.all_reduce(sums)
        if self._zero.world.is_main:
            with self._trouble.kept(), self._writing(), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **self._named(sums.sqrt())}) + "\n")

    def _gradients(self) -> Tensor:
        """Sum the squares of this rank's part of each parameter's unscaled gradient: float64, one per parameter."""
        assert self._zero.fused
        sums = torch.zeros(len(self._names), dtype=torch.float64, device=self._zero.world.device)
        parts = [list(self._zero.fused.gradients.of(group)) for group in range(len(self._zero.zero.bit16_groups))]
        for parameter, group, start, length in self._segments:
            for at, gradient in parts[group]:
                first, end = max(start, at), min(start + length, at + gradient.numel())
                if first < end:
                    sums[parameter] += sum_of_squares(gradient.reshape(-1).narrow(0, first - at, end - first))
        return sums / self._zero.loss_scale**2

    def _named(self, norms: Tensor) -> dict[str, dict[str, float | None]]:
        return {
            kind: {name: x if math.isfinite(x) else None for name, x in zip(self._names, row, strict=True)}
            for kind, row in zip(KINDS, norms.tolist(), strict=True)
        }


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum the squares of a tensor in float64: a scalar."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run takes again, and a last line that was cut short."""
    lines = read_lines(path) if path.exists() and step else ()
    kept = [json.dumps(value) + "\n" for where, value in lines if Fields.of(value, where).whole("step") <= step]
    write_atomically(path, "".join(kept).encode())

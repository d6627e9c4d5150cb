"""The validation loss of each corpus, computed by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..data.store import IGNORED
from .corpora import Corpora
from .signals import Signals
from .trouble import Trouble


@dataclass(frozen=True)
class Validation:
    """The loss on validation rows, by corpus."""

    losses: Mapping[str, float]
    """Mean cross entropy, in nats per token."""
    bytes_per_token: Mapping[str, float]
    """Mean bytes of text that the predicted tokens stand for (`data.token_bytes`)."""

    def fields(self, weights: Mapping[str, int]) -> dict[str, Any]:
        """Make the fields of StepRecord, with means over the corpora that have a weight, weighted by rows."""
        weights = {name: weight for name, weight in weights.items() if name in self.losses}
        nats, size = (
            sum(weight * values[name] for name, weight in weights.items()) / sum(weights.values())
            for values in (self.losses, self.bytes_per_token)
        )
        each = {name: _bits_per_byte(loss, self.bytes_per_token[name]) for name, loss in self.losses.items()}
        return {
            "val_loss": nats,
            "val_losses": dict(self.losses),
            "val_bpb": _bits_per_byte(nats, size),
            "val_bpbs": each,
        }

    def fields_of_average(self, weights: Mapping[str, int]) -> dict[str, Any]:
        """Make the fields of StepRecord for the averaged weights."""
        measured = self.fields(weights)
        return {f"ema_{name}": measured[name] for name in ("val_loss", "val_bpb")}


def _bits_per_byte(nats: float, size: float) -> float | None:
    """Convert nats per token of `size` bytes; None if the tokens stand for no text."""
    return nats / (size * math.log(2)) if size else None


@torch.no_grad()
def validate(
    model: nn.Module, corpora: Corpora, rows: int, batch: int, signals: Signals, trouble: Trouble
) -> Validation | None:
    """Compute the mean loss over the first `rows` validation rows of each corpus, in nats per token that is trained.

    The ranks divide the rows. The result is None if a rank was asked to stop meanwhile or could not read its rows;
    `signals.stop` or `signals.ended` is then set on every rank.
    """
    world = signals.world
    model.eval()
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in corpora.paths}
    with trouble.kept():
        for name, input_ids, labels, cu_seqlens in corpora.validation(rows, batch):
            if signals.stop_received:
                break
            counted = labels[labels != IGNORED]
            if not counted.numel():
                continue  # the mean over no label is not a number
            there = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.to(world.device)}
            loss = model(input_ids.to(world.device), labels.to(world.device), **there).loss
            size = int(corpora.token_bytes[counted].sum())
            sums[name] += torch.tensor([float(loss) * counted.numel(), counted.numel(), size])
    model.train()
    asked = torch.tensor([float(signals.stop_received), float(trouble.here), 0.0], dtype=torch.float64)
    table = torch.stack([asked, *sums.values()]).to(world.device)  # (1 + corpora, [loss sum, labels, bytes])
    if world.size > 1:
        dist.all_reduce(table)
    signals.stop |= bool(table[0, 0] > 0)
    signals.ended |= bool(table[0, 1] > 0)
    if signals.stop or signals.ended:
        return None
    means = (table[1:, ::2] / table[1:, 1:2]).tolist()  # (corpora, [loss, bytes])
    found = {name: mean for name, mean in zip(sums, means, strict=True) if mean[0] == mean[0]}  # NaN: no rows
    if not found:
        return None
    return Validation(*({name: mean[part] for name, mean in found.items()} for part in (0, 1)))

"""The validation loss of each corpus, computed by all ranks together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from .corpora import Corpora
from .signals import Signals
from .trouble import Trouble


@torch.no_grad()
def validate(
    model: nn.Module, corpora: Corpora, rows: int, batch: int, signals: Signals, trouble: Trouble
) -> dict[str, float]:
    """Compute the mean loss over the first `rows` validation rows of each corpus, in nats per token.

    The ranks divide the rows. The result is empty if a rank was asked to stop meanwhile or could not read its rows;
    `signals.stop` or `signals.ended` is then set on every rank.
    """
    world = signals.world
    model.eval()
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in corpora.paths}
    with trouble.kept():
        for name, input_ids, labels, cu_seqlens in corpora.validation(rows, batch):
            if signals.stop_received:
                break
            there = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.to(world.device)}
            loss = model(input_ids.to(world.device), labels.to(world.device), **there).loss
            sums[name] += torch.tensor([float(loss) * labels.numel(), labels.numel()])
    model.train()
    asked = torch.tensor([float(signals.stop_received), float(trouble.here)], dtype=torch.float64)
    table = torch.stack([asked, *sums.values()]).to(world.device)  # (1 + corpora, [loss sum, labels])
    if world.size > 1:
        dist.all_reduce(table)
    signals.stop |= bool(table[0, 0] > 0)
    signals.ended |= bool(table[0, 1] > 0)
    if signals.stop or signals.ended:
        return {}
    means = (table[1:, 0] / table[1:, 1]).tolist()
    return {name: mean for name, mean in zip(sums, means, strict=True) if mean == mean}  # NaN: no validation rows

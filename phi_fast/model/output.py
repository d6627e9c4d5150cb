"""The result of either model's forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Output:
    """Loss or logits."""

    loss: Tensor | None
    """Mean cross entropy over the labels that are not -100: a scalar, fp32 (fp64 for an fp64 model)."""
    logits: Tensor | None
    """(batch, sequence, vocab_size)."""

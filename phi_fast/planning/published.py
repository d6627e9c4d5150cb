"""Published speeds, and the plan's for the same devices."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipes import RECIPES
from .devices import DEVICES
from .estimate import Job, Plan, plan

_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
_REPORT = "arXiv 2309.05463, table 1: 1.5 K GPU hours for 150 B tokens"
_CARD = "model card of microsoft/phi-1_5: 32 A100-40G for 8 days, for 150 B tokens"


@dataclass(frozen=True)
class Published:
    """A speed reported by others."""

    what: str
    device: str
    devices: int
    tokens_per_second: float
    """Per device."""
    mfu: float | None
    """MFU as reported, with attention in full; None: not reported, and computed from the tokens."""
    source: str
    micro_batch: int | None = None
    """Rows per device and micro-batch, if reported."""


# MPT-1B has phi-1.5's width, depth and context; 16 heads of 128, tied embedding, bf16, FSDP without recomputation.
PUBLISHED = (
    Published("MPT-1B", "A100-40", 8, 19_271, 0.5623, _FOUNDRY, 8),
    Published("MPT-1B", "A100-40", 128, 18_647, 0.5441, _FOUNDRY, 10),
    Published("MPT-1B", "A100-80", 8, 20_513, 0.5986, _FOUNDRY, 14),
    Published("MPT-1B", "H100", 8, 45_455, 0.4182, _FOUNDRY, 14),
    Published("MPT-1B", "H100", 64, 44_402, 0.4085, _FOUNDRY, 20),
    Published("phi-1.5", "A100-80", 32, 150e9 / (1500 * 3600), None, _REPORT),
    Published("phi-1.5", "A100-40", 32, 150e9 / (32 * 8 * 86400), None, _CARD),
)
"""The report does not say how many devices it used; 32 is the model card's number."""


@dataclass(frozen=True)
class Comparison:
    """A published speed, and the plan for phi-1.5 on the same devices."""

    published: Published
    plan: Plan
    mfu: float
    """The published MFU, or computed from phi-1.5's FLOPs with attention in full."""

    @property
    def ratio(self) -> float:
        """Planned ÷ published tokens/s per device."""
        return self.plan.tokens_per_second_per_device / self.published.tokens_per_second


def compare() -> list[Comparison]:
    """Plan phi-1.5's recipe for each entry of `PUBLISHED`."""
    recipe = RECIPES["phi-1.5"]
    flops = recipe.model.flops_per_token(recipe.sequence_length, causal=False)
    rows = []
    for entry in PUBLISHED:
        device = DEVICES[entry.device]
        ours = plan(Job(recipe, device, entry.devices))
        mfu = entry.mfu if entry.mfu is not None else entry.tokens_per_second * flops / device.flops.value
        rows.append(Comparison(entry, ours, mfu))
    return rows

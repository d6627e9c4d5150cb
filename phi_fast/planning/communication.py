"""What ZeRO-2 sends in a step, and how long it takes.

The ZeRO paper (arXiv 1910.02054) reduce-scatters gradients and all-gathers weights. DeepSpeed 0.19.8 reduces each
bucket by an all-reduce instead (`use_multi_rank_bucket_allreduce`, its default), which sends twice as much, and does so
for every micro-batch, because a rank keeps only its own part. Both are counted; the time is DeepSpeed's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import PhiConfig
from .devices import HOP, LINK_EFFICIENCY, NETWORK_HOP, Device
from .memory import bucket_elements


@dataclass(frozen=True)
class Communication:
    """What one rank sends in one step."""

    reduce_scatter_bytes: float
    """Sent, if gradients were reduce-scattered once a micro-batch."""
    gradient_bytes: float
    """Sent by DeepSpeed's all-reduces."""
    gather_bytes: float
    """Sent by the all-gather of the updated weights."""
    bus: float
    """Bytes/s that a rank sends in a large collective; 0 for one rank."""
    gradient_seconds: float
    """All all-reduces of a step, hidden or not."""
    exposed_seconds: float
    """What of them the backward does not hide."""
    gather_seconds: float
    """After the update: nothing hides it."""


def communication(
    config: PhiConfig, device: Device, ranks: int, itemsize: int, micro_batches: int, backward_seconds: float
) -> Communication:
    """backward_seconds: of one micro-batch, for what it hides: a bucket is reduced while the next fills, so the time
    before the first is full hides nothing and the last is sent when the backward is over."""
    if ranks == 1:
        return Communication(0, 0, 0, 0, 0, 0, 0)
    parameters, bucket = config.num_parameters(), bucket_elements(config)
    bus, reduce_latency, gather_latency = _links(device, ranks)
    share = (ranks - 1) / ranks
    full, rest = divmod(parameters, bucket)
    last = rest or bucket
    earlier = (parameters - last) / parameters
    number = full + bool(rest)
    one = 2 * share * parameters * itemsize / bus + number * reduce_latency
    window = backward_seconds * (1 - min(1.0, bucket / parameters))
    exposed = one * (1 - earlier) + max(0.0, one * earlier - window)
    gathered = share * parameters * itemsize
    return Communication(
        reduce_scatter_bytes=micro_batches * gathered,
        gradient_bytes=2 * micro_batches * gathered,
        gather_bytes=gathered,
        bus=bus,
        gradient_seconds=micro_batches * one,
        exposed_seconds=micro_batches * exposed,
        gather_seconds=gathered / bus + 2 * gather_latency,  # two parameter groups: with and without weight decay
    )


def _links(device: Device, ranks: int) -> tuple[float, float, float]:
    """(bus bytes/s, seconds of latency of an all-reduce by trees, and of an all-gather by rings).

    Rings over several nodes cross each node's edge once, with all its network cards side by side.
    """
    assert device.link is not None and device.network is not None
    nodes = math.ceil(ranks / device.node)
    bus = device.link.value if nodes == 1 else min(device.link.value, device.node * device.network.value)
    tree = 2 * (math.log2(min(ranks, device.node)) * HOP.value + math.log2(nodes) * NETWORK_HOP.value)
    ring = (ranks - nodes) * HOP.value + (nodes if nodes > 1 else 0) * NETWORK_HOP.value
    return bus * LINK_EFFICIENCY.value, tree, ring

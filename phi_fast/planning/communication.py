"""Communication of ZeRO-2 in a step: bytes and time.

The ZeRO paper (arXiv 1910.02054) reduce-scatters gradients and all-gathers weights. DeepSpeed 0.19.8 all-reduces each
bucket instead (`use_multi_rank_bucket_allreduce`, its default), which sends twice as much, and does so for every
micro-batch, because a rank keeps only its own part. The bytes of both are counted; the time is DeepSpeed's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import PhiConfig
from .devices import HOP, LINK_EFFICIENCY, NETWORK_HOP, Device
from .memory import bucket_elements


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in one step, and the time that this takes."""

    reduce_scatter_bytes: float
    """Bytes that a reduce-scatter of the gradients per micro-batch would send."""
    gradient_bytes: float
    """Bytes sent by DeepSpeed's all-reduces."""
    gather_bytes: float
    """Bytes sent by the all-gather of the updated weights."""
    bus: float
    """Bytes/s that a rank sends in a large collective; 0 for one rank."""
    gradient_seconds: float
    """Time of all all-reduces in a step, overlapped or not."""
    exposed_seconds: float
    """The part of `gradient_seconds` that does not overlap with the backward pass."""
    gather_seconds: float
    """Time of the all-gather, after the update, which overlaps with nothing."""


def communication(
    config: PhiConfig, device: Device, ranks: int, itemsize: int, micro_batches: int, backward_seconds: float
) -> Communication:
    """Count the bytes and estimate the time of one step's communication.

    backward_seconds: time of one micro-batch's backward pass, which overlaps with the all-reduces. Each bucket is
    reduced while the next one fills; so nothing overlaps before the first is full, and the last is sent at the end.
    """
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
    """Return (bus bytes/s, latency in seconds of a tree all-reduce, latency of a ring all-gather).

    A ring over several nodes leaves each node once, over all of the node's network cards in parallel.
    """
    assert device.link is not None and device.network is not None
    nodes = math.ceil(ranks / device.node)
    bus = device.link.value if nodes == 1 else min(device.link.value, device.node * device.network.value)
    tree = 2 * (math.log2(min(ranks, device.node)) * HOP.value + math.log2(nodes) * NETWORK_HOP.value)
    ring = (ranks - nodes) * HOP.value + (nodes if nodes > 1 else 0) * NETWORK_HOP.value
    return bus * LINK_EFFICIENCY.value, tree, ring

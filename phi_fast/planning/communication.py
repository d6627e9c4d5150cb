"""What ZeRO-2 sends in a step, and how long it takes.

The ZeRO paper (arXiv 1910.02054) reduce-scatters gradients and all-gathers weights. DeepSpeed reduces each part of a
bucket to the rank that owns it (`zero._config`), which sends as much as a reduce-scatter, for every micro-batch or once
per step (`training.deferred_gradients`).
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

    gradient_bytes: float
    """Sent to reduce the gradients."""
    gather_bytes: float
    """Sent by the all-gather of the updated weights."""
    bus: float
    """Bytes/s that a rank sends in a large collective; 0 for one rank."""
    gradient_seconds: float
    """All reductions of a step, hidden or not."""
    exposed_seconds: float
    """What of them the backward does not hide."""
    gather_seconds: float
    """After the update: nothing hides it."""


def communication(
    config: PhiConfig, device: Device, ranks: int, itemsize: int, reductions: int, backward_seconds: float
) -> Communication:
    """Estimate the communication of a step.

    reductions: how often gradients are reduced in it. backward_seconds: of one micro-batch, for what it hides: a bucket
    is reduced while the next fills, so the time before the first is full hides nothing and the last is sent when the
    backward is over.
    """
    if ranks == 1:
        return Communication(0, 0, 0, 0, 0, 0)
    parameters, bucket = config.num_parameters(), bucket_elements(config)
    bus, latency = _links(device, ranks)
    sent = (ranks - 1) / ranks * parameters * itemsize
    full, rest = divmod(parameters, bucket)
    earlier = (parameters - (rest or bucket)) / parameters
    calls = full + bool(rest) + ranks - 1  # a bucket is cut where its owner changes
    one = sent / bus + calls * latency
    window = backward_seconds * (1 - min(1.0, bucket / parameters))
    exposed = one * (1 - earlier) + max(0.0, one * earlier - window)
    return Communication(
        gradient_bytes=reductions * sent,
        gather_bytes=sent,
        bus=bus,
        gradient_seconds=reductions * one,
        exposed_seconds=reductions * exposed,
        gather_seconds=sent / bus + 2 * latency,  # two parameter groups: with and without weight decay
    )


def _links(device: Device, ranks: int) -> tuple[float, float]:
    """(bus bytes/s, seconds of latency of a collective by rings).

    Rings over several nodes cross each node's edge once, with all its network cards side by side.
    """
    assert device.link is not None and device.network is not None
    nodes = math.ceil(ranks / device.node)
    bus = device.link.value if nodes == 1 else min(device.link.value, device.node * device.network.value)
    ring = (ranks - nodes) * HOP.value + (nodes if nodes > 1 else 0) * NETWORK_HOP.value
    return bus * LINK_EFFICIENCY.value, ring

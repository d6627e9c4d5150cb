"""Communication of ZeRO-2 in a step: bytes and time.

The ZeRO paper (arXiv 1910.02054) reduce-scatters gradients and all-gathers weights. DeepSpeed reduces each part of a
bucket to the rank that owns it, which sends as much as a reduce-scatter; among many ranks it all-reduces the bucket,
which sends twice as much in fewer calls. Either is done for every micro-batch, or once per step
(`training.deferred_gradients`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..training.deferred_gradients import reduces_to_owners
from .devices import HOP, LINK_EFFICIENCY, NETWORK_HOP, Device
from .memory import bucket_elements


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in one step, and the time that this takes."""

    gradient_bytes: float
    """Bytes sent to reduce the gradients."""
    gather_bytes: float
    """Bytes sent by the all-gather of the updated weights."""
    bus: float
    """Bytes/s that a rank sends in a large collective; 0 for one rank."""
    gradient_seconds: float
    """Time of all reductions in a step, overlapped or not."""
    exposed_seconds: float
    """The part of `gradient_seconds` that does not overlap with the backward pass."""
    gather_seconds: float
    """Time of the all-gather, after the update, which overlaps with nothing."""


def communication(
    parameters: int, device: Device, ranks: int, itemsize: int, reductions: int, backward_seconds: float
) -> Communication:
    """Count the bytes and estimate the time of one step's communication.

    parameters: the number that is trained. reductions: how often gradients are reduced in the step. backward_seconds:
    time of one micro-batch's backward pass, which overlaps with the reductions. Each bucket is reduced while
    the next one fills; so nothing overlaps before the first is full, and the last is sent at the end.
    """
    if ranks == 1:
        return Communication(0, 0, 0, 0, 0, 0)
    bucket = bucket_elements(parameters)
    bus, tree, ring = _links(device, ranks)
    sent = (ranks - 1) / ranks * parameters * itemsize
    to_owners = reduces_to_owners(ranks)
    full, rest = divmod(parameters, bucket)
    earlier = (parameters - (rest or bucket)) / parameters
    buckets = full + bool(rest)
    # A bucket is cut where its owner changes.
    one = sent / bus + (buckets + ranks - 1) * ring if to_owners else 2 * sent / bus + buckets * tree
    window = backward_seconds * (1 - min(1.0, bucket / parameters))
    exposed = one * (1 - earlier) + max(0.0, one * earlier - window)
    return Communication(
        gradient_bytes=reductions * sent * (1 if to_owners else 2),
        gather_bytes=sent,
        bus=bus,
        gradient_seconds=reductions * one,
        exposed_seconds=reductions * exposed,
        gather_seconds=sent / bus + 2 * ring,  # two parameter groups: with and without weight decay
    )


def _links(device: Device, ranks: int) -> tuple[float, float, float]:
    """Return (bus bytes/s, latency in seconds of a tree all-reduce, latency of a ring collective).

    A ring over several nodes leaves each node once, over all of the node's network cards in parallel.
    """
    assert device.link is not None and device.network is not None
    nodes = math.ceil(ranks / device.node)
    bus = device.link.value if nodes == 1 else min(device.link.value, device.node * device.network.value)
    tree = 2 * (math.log2(min(ranks, device.node)) * HOP.value + math.log2(nodes) * NETWORK_HOP.value)
    ring = (ranks - nodes) * HOP.value + (nodes if nodes > 1 else 0) * NETWORK_HOP.value
    return bus * LINK_EFFICIENCY.value, tree, ring

"""One profile of the training step: milliseconds of each kernel against its bound, launches, gaps, memory against
`plan`."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch

from benchmarks import models, sizes, steps, timing
from benchmarks.gpu.runner import Session
from phi_fast import PhiConfig
from phi_fast.kernels import backend
from phi_fast.peaks import peak_flops
from phi_fast.planning.memory import memory
from phi_fast.planning.work import Kernel, Shape, micro_batch, update

GROUPS = {
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|mm_",
    "attention forward": r"^forward_kernel",
    "attention backward": r"^(dq|dkv)_kernel",
    "layer_norm": r"^_layer_norm",
    "gelu": r"^_(forward|backward)$",
    "rotary": r"^_rotate",
    "cross_entropy": r"^(_cross_entropy|_add_column_sums|_statistics)",
    "adam": r"^_adam",
    "muon": r"^_symmetric",
    "norm": r"^_sum_of_squares",
    "embedding": r"embedding|indexSelect|index_select",
}
"""What `planning.work` counts as one kind of work, and the names of the GPU's kernels that do it."""
OTHER = "copies and other kernels of torch"


def measure(session: Session, config: PhiConfig, rows: int, dtype: torch.dtype) -> None:
    """Profile one step after two others, and put the table, the launches and the memory."""
    with timing.device():
        step = steps.ours(config, models.data(config, rows, timing.device()), dtype)
    for _ in range(2):
        step()
    if not sizes.GPU:
        session.put("profile", [{"kernel": "all", "ms": None, "launches": None, "bound ms": None, "of bound": None}])
        return
    events, wall = trace(step)
    rows_of_groups = table(events, bounds(config, rows, dtype))
    session.put("profile", rows_of_groups)
    session.put("efficiencies", efficiencies(rows_of_groups))
    session.put("step under the profiler", gaps(events, wall))
    planned = memory(shape(config, rows, dtype), 1, gpu=True, accumulating=False)
    held = planned.peak - planned.context - planned.fragmentation
    used = {"allocated at most": torch.cuda.max_memory_allocated() >> 20, "planned": round(held / 2**20)}
    session.put("memory in torch's allocator, MB", used)


def trace(step: steps.Step) -> tuple[list[tuple[str, float, float]], float]:
    """((name, start, end in microseconds) of everything the GPU did in one step, seconds of the step)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
    found = [e for e in recorded.events() if e.device_type == DeviceType.CUDA]
    return [(e.name, e.time_range.start, e.time_range.end) for e in found], begin.elapsed_time(end) / 1000


def table(events: list[tuple[str, float, float]], least: dict[str, float]) -> list[dict[str, Any]]:
    """One row per group of kernels, the longest first. least: seconds that a group's work takes at the data sheet's
    rates, by group; a group without work of its own has no bound."""
    milliseconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for name, start, end in events:
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), OTHER)
        milliseconds[group] += (end - start) / 1000
        launches[group] += 1
    rows = []
    for group in sorted(milliseconds, key=lambda g: -milliseconds[g]):
        bound = 1000 * least[group] if group in least else None
        rows.append(
            {
                "kernel": group,
                "ms": round(milliseconds[group], 3),
                "launches": launches[group],
                "bound ms": None if bound is None else round(bound, 3),
                "of bound": None if bound is None else f"{bound / milliseconds[group]:.0%}",
            }
        )
    return rows


KINDS = {"matrix products": "product", "attention forward": "attention forward"}
KINDS |= {"attention backward": "attention backward"}
"""Groups that are bound by arithmetic -> their kind in `planning.devices`. All others move memory."""


def efficiencies(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the data sheet's rate that each kind of work reached in the step: what `plan --measured` reads."""
    bound: dict[str, float] = defaultdict(float)
    taken: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["bound ms"] is not None and row["kernel"] != OTHER:
            kind = KINDS.get(row["kernel"], "memory")
            bound[kind] += row["bound ms"]
            taken[kind] += row["ms"]
    return {kind: round(bound[kind] / taken[kind], 4) for kind in bound}


def gaps(events: list[tuple[str, float, float]], wall: float) -> dict[str, float]:
    """Milliseconds in which the GPU worked and in which it waited, between its first and its last kernel."""
    busy, reached = 0.0, min(start for _, start, _ in events)
    for _, start, end in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - min(start for _, start, _ in events)
    return {
        "ms of the step": round(1000 * wall, 3),
        "ms in which the GPU worked": round(busy / 1000, 3),
        "ms of gaps between kernels": round((span - busy) / 1000, 3),
        "launches": len(events),
    }


def bounds(config: PhiConfig, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """Group -> seconds that its work takes at the data sheet's rates of this GPU, nothing lost; none where its rates
    are not known."""
    from phi_fast.planning.devices import DEVICES

    name = torch.cuda.get_device_name()
    device = next((d for known, d in DEVICES.items() if known.replace("-", " ") in name), None)
    if device is None or peak_flops(name) is None:
        return {}
    itemsize = torch.finfo(dtype).bits // 8
    found: dict[str, float] = defaultdict(float)
    for kernel in [
        *micro_batch(shape(config, rows, dtype)),
        *update(config.num_parameters(), itemsize, 1, accumulating=False),
    ]:
        moving, computing = kernel.bytes_moved / device.bandwidth.value, kernel.flops / device.flops.value
        found[group_of(kernel)] += kernel.count * max(moving, computing)
    return dict(found)


def group_of(kernel: Kernel) -> str:
    """The group of `GROUPS` that does a kind of counted work."""
    if kernel.kind == "product":
        return "matrix products"
    if kernel.name == "attention":
        return kernel.kind
    known = {"final_norm": "layer_norm", "layer_norm again": "layer_norm"}
    name = known.get(kernel.name, kernel.name)
    return name if name in GROUPS else OTHER


def shape(config: PhiConfig, rows: int, dtype: torch.dtype) -> Shape:
    """The micro-batch as `plan` counts it."""
    inside = backend.rotary_inside(timing.device())
    itemsize = torch.finfo(dtype).bits // 8
    return Shape(config, config.max_position_embeddings, rows, itemsize, "norm_gelu", inside)

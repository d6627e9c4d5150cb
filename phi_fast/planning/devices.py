"""Accelerators with their data sheets' figures, and the share of these figures that kernels are assumed to reach."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UsageError
from ..peaks import PEAK_TFLOPS

Kind = Literal["product", "attention forward", "attention backward", "memory"]

ASSUMPTION = "assumption"


@dataclass(frozen=True)
class Figure:
    """A number with its unit and source."""

    value: float
    unit: str
    source: str
    """A document, or `ASSUMPTION` and the reason for it."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's CPU."""

    name: str
    memory: Figure | None
    """Bytes; None: no limit is planned for (a CPU swaps before it fails)."""
    flops: Figure
    """Dense FLOP/s of matrix products in the storage dtype."""
    bandwidth: Figure
    """Memory bandwidth in bytes/s, reads and writes together."""
    link: Figure | None
    """Bytes/s that a device sends to the others in its node."""
    network: Figure | None
    """A device's share of the network: bytes/s that a node sends to other nodes ÷ devices per node."""
    node: int
    """Devices per node."""
    efficiency: dict[Kind, Figure]
    """Share of `flops` (products, attention) or of `bandwidth` (memory) that kernels reach."""
    price: Figure | None
    """Currency units per device hour."""

    def seconds(self, kind: Kind, flops: float, bytes_moved: float) -> float:
        """Estimate a kernel's time by the roofline: the larger of compute and memory time, each at its efficiency."""
        computing = 0.0 if kind == "memory" else flops / (self.flops.value * self.efficiency[kind].value)
        return max(computing, bytes_moved / (self.bandwidth.value * self.efficiency["memory"].value))


LAUNCH = Figure(1e-5, "s", f"{ASSUMPTION}: least time per kernel in eager PyTorch, without DeepSpeed's Python code")
LINK_EFFICIENCY = Figure(0.8, "", f"{ASSUMPTION}: NCCL's bus bandwidth ÷ the link's, for large messages")
HOP = Figure(2e-6, "s", f"{ASSUMPTION}: latency per step of a collective inside a node")
NETWORK_HOP = Figure(10e-6, "s", f"{ASSUMPTION}: latency per step of a collective between nodes")
CONTEXT = Figure(1.5e9, "B", f"{ASSUMPTION}: CUDA context, cuBLAS workspaces, NCCL's buffers")
FRAGMENTATION = Figure(0.05, "", f"{ASSUMPTION}: memory lost by the caching allocator, as a share of all other memory")

_FLASH = "FlashAttention-2 (arXiv 2307.08691, section 4.1) reaches {} at head dim 128; less is assumed for 64"


def _efficiencies(product: float, forward: float, backward: float, flash: str) -> dict[Kind, Figure]:
    attention = f"{ASSUMPTION}: {flash}"
    return {
        "product": Figure(product, "", f"{ASSUMPTION}: large cuBLAS or hipBLASLt products in a training step"),
        "attention forward": Figure(forward, "", attention),
        "attention backward": Figure(backward, "", attention),
        "memory": Figure(0.85, "", f"{ASSUMPTION}: streaming kernels of this project, not measured on a GPU"),
    }


def _gpu(
    name: str,
    sheet: str,
    *,
    memory: float,
    flops: float,
    bandwidth: float,
    link: float,
    network: float,
    network_source: str,
    efficiency: dict[Kind, Figure],
    price: float,
) -> Device:
    """Make a GPU from figures in GB, TFLOP/s and GB/s."""
    return Device(
        name,
        Figure(memory * 1e9, "B", sheet),
        Figure(flops * 1e12, "FLOP/s", f"{sheet}: dense fp16 and bf16"),
        Figure(bandwidth * 1e9, "B/s", sheet),
        Figure(link * 1e9, "B/s", f"{sheet}: half of the bidirectional total"),
        Figure(network * 1e9, "B/s", network_source),
        8,
        efficiency,
        Figure(price, "$/h", f"{ASSUMPTION}: a round figure for a rented device hour; give --price"),
    )


_A100 = _gpu(
    "A100-40",
    "NVIDIA A100 data sheet (SXM 40 GB)",
    memory=40,
    flops=PEAK_TFLOPS["A100"],
    bandwidth=1555,
    link=300,
    network=25,
    network_source="NVIDIA DGX A100 data sheet: 8 × 200 Gb/s HDR",
    efficiency=_efficiencies(0.75, 0.45, 0.38, _FLASH.format("230 of 312 TFLOP/s forward on an A100")),
    price=1.5,
)
_H100 = _gpu(
    "H100",
    "NVIDIA H100 data sheet (SXM)",
    memory=80,
    flops=PEAK_TFLOPS["H100"],
    bandwidth=3350,
    link=450,
    network=50,
    network_source="NVIDIA DGX H100 data sheet: 8 × 400 Gb/s NDR",
    efficiency=_efficiencies(0.65, 0.30, 0.22, _FLASH.format("335 of 989 TFLOP/s on an H100")),
    price=3.0,
)


def _variant(base: Device, name: str, sheet: str, *, memory: float, bandwidth: float, price: float) -> Device:
    """Make a variant of a GPU: the same chip with different memory."""
    assert base.price is not None
    return replace(
        base,
        name=name,
        memory=Figure(memory * 1e9, "B", sheet),
        bandwidth=Figure(bandwidth * 1e9, "B/s", sheet),
        price=replace(base.price, value=price),
    )


def _consumer(name: str, sheet: str, *, memory: float, bandwidth: float, link: float) -> Device:
    """Make a GPU in a PCIe slot."""
    return _gpu(
        name,
        sheet,
        memory=memory,
        flops=PEAK_TFLOPS.get(name.replace("-", " "), 1.0),
        bandwidth=bandwidth,
        link=link,
        network=12.5,
        network_source=f"{ASSUMPTION}: 100 Gb/s per node",
        efficiency=_efficiencies(0.65, 0.30, 0.22, "no published figure for this project's kind of Triton kernel"),
        price=0.5,
    )


_OTHER = _consumer("other", "given by options", memory=1, bandwidth=1, link=32)

DEVICES: dict[str, Device] = {
    "A100-40": _A100,
    "A100-80": _variant(_A100, "A100-80", "NVIDIA A100 data sheet (SXM 80 GB)", memory=80, bandwidth=2039, price=2.0),
    "H100": _H100,
    "H200": _variant(_H100, "H200", "NVIDIA H200 data sheet (SXM)", memory=141, bandwidth=4800, price=3.5),
    "B200": _gpu(
        "B200",
        "NVIDIA DGX B200 data sheet (an eighth of the system)",
        memory=180,
        flops=PEAK_TFLOPS["B200"],
        bandwidth=8000,
        link=900,
        network=50,
        network_source="NVIDIA DGX B200 data sheet: 400 Gb/s per GPU",
        efficiency=_efficiencies(0.65, 0.22, 0.16, "no published figure for this project's kind of Triton kernel"),
        price=5.0,
    ),
    "L40S": _consumer("L40S", "NVIDIA L40S data sheet", memory=48, bandwidth=864, link=32),
    "RTX-3090": _consumer(
        "RTX-3090",
        "NVIDIA Ampere GA102 whitepaper, GeForce RTX 3090",
        memory=24,
        bandwidth=936,
        link=32,
    ),
    "RTX-4090": _consumer(
        "RTX-4090",
        "NVIDIA Ada whitepaper, GeForce RTX 4090",
        memory=24,
        bandwidth=1008,
        link=32,
    ),
    "RTX-5090": _consumer(
        "RTX-5090",
        "NVIDIA RTX Blackwell whitepaper, GeForce RTX 5090",
        memory=32,
        bandwidth=1792,
        link=64,
    ),
    "MI300X": _gpu(
        "MI300X",
        "AMD Instinct MI300X data sheet",
        memory=192,
        flops=PEAK_TFLOPS["MI300X"],
        bandwidth=5300,
        link=448,
        network=50,
        network_source=f"{ASSUMPTION}: 8 × 400 Gb/s per node",
        efficiency=_efficiencies(0.45, 0.20, 0.15, "no published figure for this project's kind of Triton kernel"),
        price=2.5,
    ),
}
"""Devices by the name of `--gpu`."""

_SHORT = {"a100": "A100-80", "3090": "RTX-3090", "4090": "RTX-4090", "5090": "RTX-5090", "mi300": "MI300X"}


def find_device(name: str, memory: float | None, flops: float | None, bandwidth: float | None) -> Device:
    """Find a device by its name, in upper or lower case; given figures (GB, TFLOP/s, GB/s) replace its data sheet's.

    An unknown name needs all three figures. Otherwise UsageError is raised, with the nearest names.
    """
    given = {"memory": memory, "flops": flops, "bandwidth": bandwidth}
    for option, value in given.items():
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"--{option} {value}: expected a positive number")
    names = {known.casefold(): known for known in DEVICES} | _SHORT
    key = name.casefold().replace(" ", "-")
    known = names.get(key) or names.get(f"rtx-{key}")
    if known is None and None in given.values():
        near = [names[each] for each in difflib.get_close_matches(key, names, 3, 0.5)]
        guess = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        raise UsageError(
            f"--gpu {name} is not known.{guess} Known devices: {', '.join(DEVICES)}. For another one, give --memory, "
            "--flops and --bandwidth"
        )
    device = DEVICES[known] if known else replace(_OTHER, name=name)
    scales = {"memory": (1e9, "B"), "flops": (1e12, "FLOP/s"), "bandwidth": (1e9, "B/s")}
    figures: dict[str, Any] = {
        option: Figure(value * scales[option][0], scales[option][1], f"--{option}")
        for option, value in given.items()
        if value is not None
    }
    return replace(device, **figures)

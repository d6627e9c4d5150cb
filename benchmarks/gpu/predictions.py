"""Milliseconds expected of a GPU before it was touched; docs/predicted-h100.md is written from them.

Each kernel takes its bytes or its FLOPs at a share of the data sheet's rate. The shares were estimated from the
compiled code (docs/codegen.md: registers, occupancy, instructions) and from what others publish about similar kernels.
`make gpu` prints measured ÷ predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phi_fast import PhiConfig
from phi_fast.planning import work
from phi_fast.planning.work import Kernel, Shape

TOKENS, WIDTH, HEADS, VOCABULARY, LENGTH = 8192, 2048, 32, 51200, 2048
MICRO_BATCH = 16
"""Rows of the training step: the largest power of two whose activations fit beside 20 GB of weights and state."""


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet, dense rates in 16 bits."""

    flops: float
    bandwidth: float


SHEETS = {
    "H100 80GB HBM3": Sheet(989.4e12, 3.35e12),
    "H100 PCIe": Sheet(756e12, 2.0e12),
    "H200": Sheet(989.4e12, 4.8e12),
}
"""Part of the driver's name -> its sheet (NVIDIA H100 and H200 Tensor Core GPU data sheets)."""


class Share(NamedTuple):
    """The share of a rate that is expected, and why."""

    value: float
    why: str


SHARES = {
    "streaming": Share(0.88, "one pass of 128-bit accesses at 56 to 100% occupancy; a copy reaches 0.90 to 0.92"),
    "layer_norm backward": Share(0.75, "two rows ahead of the sums; partial rows and their sum: 9% of bytes, a launch"),
    "bias_gelu backward": Share(0.75, "31% occupancy, 85 registers, partial sums of the bias"),
    "adam": Share(0.85, "25% occupancy but 28 bytes per parameter in flight in each lane"),
    "cross entropy": Share(
        0.75, "a row is read once, into registers: 25% occupancy, loads and exponentials half apart"
    ),
    "product": Share(0.70, "cuBLAS at 8192 × 2048 × 14336 in 16 bits; 700 W do not hold the clock of 989 TFLOP/s"),
    "product on chip": Share(0.32, "64 FLOPs per byte of L2, and exponentials between the products"),
    "attention forward": Share(0.27, "head dim 64, causal: exponentials take as long as the products; 2 CTAs per SM"),
    "attention backward": Share(0.19, "five products in two kernels, 19 and 12% occupancy, P formed twice"),
}


def predicted(device: str) -> dict[str, float]:
    """Milliseconds by the names of `page.milliseconds`; empty for a GPU that nothing was predicted for."""
    sheet = next((sheet for part, sheet in SHEETS.items() if part in device), None)
    return {} if sheet is None else _of(sheet)


def _of(sheet: Sheet) -> dict[str, float]:
    def memory(moved: float, share: str = "streaming") -> float:
        return 1e3 * moved / (sheet.bandwidth * SHARES[share].value)

    def compute(flops: float, share: str = "product") -> float:
        return 1e3 * flops / (sheet.flops * SHARES[share].value)

    element = 2.0
    rows = TOKENS * WIDTH * element
    wide = 4096 * 8192 * element
    logits = 2 * TOKENS * WIDTH * VOCABULARY
    found: dict[str, float] = {}
    for dtype in ("fp16", "bf16"):
        found |= {
            f"layer_norm, {dtype}, forward": memory(2 * rows),
            f"layer_norm, {dtype}, backward": memory(3 * rows, "layer_norm backward"),
            f"bias_gelu, {dtype}, forward": memory(2 * wide),
            f"bias_gelu, {dtype}, backward": memory(3 * wide, "bias_gelu backward"),
            f"rotary, {dtype}, forward": memory(2 * rows),  # half of the dims of q and k, in place
            f"cross entropy of a chunk, {dtype}, loss and gradient": memory(
                3 * 1024 * VOCABULARY * element, "cross entropy"
            ),  # and the bias's gradient reads the chunk once more
            f"linear_cross_entropy, {dtype}, loss alone": compute(logits) + memory(TOKENS * VOCABULARY * element),
            f"linear_cross_entropy, {dtype}, loss alone, logits on chip": compute(logits, "product on chip"),
        }
        for batch, length in ((4, 2048), (16, 512)):
            product = batch * HEADS * length**2 * 64
            short = 1.0 if length == 2048 else 0.8  # a causal block's diagonal weighs more in short rows
            name = f"attention, sequence {length}, {dtype}"
            found[f"{name}, forward"] = compute(2 * product, "attention forward") / short
            found[f"{name}, backward"] = compute(5 * product, "attention backward") / short
        found |= {name.format(dtype): milliseconds(sheet, kernels) for name, kernels in _of_a_step().items()}
    return found


def _of_a_step() -> dict[str, list[Kernel]]:
    """The kernels of a block, of head and loss, and of the step, as `planning.work` counts them."""
    config = PhiConfig()
    small, step = (Shape(config, LENGTH, rows, 2, "norm_gelu", False) for rows in (TOKENS // LENGTH, MICRO_BATCH))
    layer = work.block(small)
    return {
        "linear_cross_entropy, {}, forward and backward": [k for k in work.head(small) if k.name != "final_norm"],
        "parallel_block, {}, forward": [kernel for kernel in layer if kernel.phase == "forward"],
        "parallel_block, {}, backward": [kernel for kernel in layer if kernel.phase == "backward"],
        "training step, phi-1.5, {}": [
            *work.micro_batch(step),
            *work.update(config.num_parameters(), 2, 1, accumulating=False),
        ],
    }


def milliseconds(sheet: Sheet, kernels: Iterable[Kernel]) -> float:
    """Expected milliseconds of kernels one after the other."""
    return sum(kernel.count * _milliseconds(sheet, kernel) for kernel in kernels)


def _milliseconds(sheet: Sheet, kernel: Kernel) -> float:
    share = SHARES[_share(kernel)].value
    if kernel.kind == "memory":
        return 1e3 * kernel.bytes_moved / (sheet.bandwidth * share)
    return 1e3 * kernel.flops / (sheet.flops * share)


def _share(kernel: Kernel) -> str:
    """The name of the share of a rate that `kernel` reaches."""
    if kernel.kind != "memory":
        return kernel.kind
    if kernel.phase == "backward" and kernel.name in ("layer_norm", "final_norm"):
        return "layer_norm backward"
    if kernel.phase == "backward" and kernel.name == "gelu":
        return "bias_gelu backward"
    return {"cross_entropy": "cross entropy", "adam": "adam", "norm": "adam"}.get(kernel.name, "streaming")


def page() -> str:
    """docs/predicted-h100.md."""
    shares = [f"| {name} | {share.value:.2f} | {share.why} |" for name, share in SHARES.items()]
    names = [part for part in SHEETS if "H100" in part]
    expected = {name: predicted(name) for name in names}
    rows = [
        f"| {what} | " + " | ".join(f"{expected[name][what]:.4g}" for name in names) + " |"
        for what in expected[names[0]]
    ]
    return PAGE.format(
        shares="\n".join(shares), names=" | ".join(names), rule="|".join("---:" for _ in names), rows="\n".join(rows)
    )


PAGE = """# What an H100 is expected to show

Written by `python -m benchmarks.gpu.predictions` before any GPU was touched. Nothing here is measured. `make gpu`
prints measured ÷ predicted for each line; the goal is a mean error of 10%.

A kernel takes its bytes at a share of the data sheet's bandwidth, or its FLOPs at a share of the dense rate. The
kernels of the block, of head and loss and of the step are those that `plan` counts (`phi_fast/planning/work.py`).

| | share | why |
|---|---:|---|
{shares}

Milliseconds in fp16 or bf16, at phi-1.5's width and 8192 tokens; the training step has 16 rows of 2048 tokens:

| | {names} |
|---|{rule}|
{rows}
"""

if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "predicted-h100.md"
    path.write_text(page(), encoding="utf-8")

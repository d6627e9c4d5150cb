"""Peak dense 16-bit rates of GPUs from their makers' data sheets, for MFU and `plan`."""

from __future__ import annotations

PEAK_TFLOPS = {
    "B200": 2250.0,  # NVIDIA DGX B200 data sheet, an eighth of the system
    "H200": 989.4,  # NVIDIA H200 data sheet (SXM)
    "H100 NVL": 835.0,  # NVIDIA H100 NVL data sheet
    "H100 PCIe": 756.0,  # NVIDIA H100 data sheet (PCIe)
    "H100": 989.4,  # NVIDIA H100 data sheet (SXM)
    "A100": 312.0,  # NVIDIA A100 data sheet
    "L40S": 362.0,  # NVIDIA L40S data sheet
    # Consumer cards: the rate with fp32 accumulation, which is half of the rate with fp16 accumulation.
    "RTX 5090": 209.5,  # NVIDIA RTX Blackwell whitepaper
    "RTX 4090": 165.2,  # NVIDIA Ada whitepaper
    "RTX 3090": 71.0,  # NVIDIA Ampere GA102 whitepaper
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet
}
"""TFLOP/s by a part of the driver's device name; the first match counts."""


def peak_flops(name: str) -> float | None:
    """Look up the peak FLOP/s by the driver's device name, such as "NVIDIA H100 80GB HBM3"; None if it is not known.

    A name that continues after a consumer card's name ("RTX 4090 Laptop GPU") belongs to a different card.
    """
    for part, peak in PEAK_TFLOPS.items():
        if part in name and (not part.startswith("RTX") or name.endswith(part)):
            return peak * 1e12
    return None

"""The number formats that a model is trained and run in, and which one a device gets by default."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def auto_precision(device: torch.device) -> Precision:
    """fp16 on CUDA (the paper's), bf16 on a CPU with bf16 instructions, else fp32."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"

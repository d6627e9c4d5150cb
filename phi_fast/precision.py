"""The number formats for training and inference, and the default for each device."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def auto_precision(device: torch.device) -> Precision:
    """Choose the default: fp16 on CUDA (as in the paper), bf16 on a CPU with bf16 instructions, else fp32."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"

"""What is measured where: phi-1.5's own sizes in its 16-bit formats on a GPU, what ends in seconds on a CPU.

A GPU that is given a laptop's sizes shows how fast Python launches kernels, with most of its multiprocessors idle.
"""

from __future__ import annotations

import torch

GPU = torch.cuda.is_available()
DTYPES = ("fp16", "bf16") if GPU else ("fp32", "bf16")
"""fp16 is the trainer's default on CUDA; a CPU computes it through fp32."""
PRODUCT = 8192 if GPU else 2048
"""Side of the matrix product that bounds the others: large enough for the device's best rate."""

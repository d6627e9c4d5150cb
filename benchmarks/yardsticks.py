"""The fastest copy and matrix product of the machine, measured in the same rounds as the rows compared with them.

As contenders named "copy" and "matrix product" they bound a subject's rows, in bytes and in FLOPs per second.
"""

from __future__ import annotations

import torch

from benchmarks.subjects import Contender


def copy(size: int, device: torch.device) -> Contender:
    """A copy that moves `size` bytes: half of them read, half written."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Contender(lambda: target.copy_(source), moved=2 * source.numel())


def product(n: int, dtype: torch.dtype, device: torch.device) -> Contender:
    """torch's n × n × n matrix product, which writes into existing memory."""
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return Contender(lambda: torch.mm(a, b.T, out=out), flops=2 * n**3)

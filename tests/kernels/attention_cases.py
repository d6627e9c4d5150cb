"""Cases of attention, by phi_fast's op and by torch's public functions alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import gradients
from torch import Tensor

from phi_fast.kernels import use
from phi_fast.kernels.attention import attention

# Ragged ends, both head dims, every option alone and the options together.
CASES: dict[str, dict[str, Any]] = {
    "17 rows, head_dim 128": {"sequence": 17, "head_dim": 128},
    "63 rows, full": {"sequence": 63, "causal": False},
    "64 rows, rotary": {"sequence": 64, "rotary_dim": 32},
    "65 rows, 4 queries a key": {"sequence": 65, "heads": 4, "key_heads": 1},
    "130 rows, two sequences": {"sequence": 130, "batch": 2, "heads": 1, "key_heads": 1},
    "130 rows, documents": {"sequence": 130, "documents": [0, 5, 5, 70, 71, 130]},
    "130 rows, full, documents, rotary, grouped": {
        "sequence": 130, "causal": False, "documents": [0, 33, 97, 130], "rotary_dim": 64, "key_heads": 1,
    },
}  # fmt: skip


class Case:
    """Inputs of one case, and attention over them by whatever back end is in use."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        *,
        sequence: int,
        batch: int = 1,
        heads: int = 2,
        key_heads: int = 2,
        head_dim: int = 64,
        causal: bool = True,
        documents: list[int] | None = None,
        rotary_dim: int = 0,
        magnitude: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(sequence)

        def draw(number: int, factor: float = 1.0) -> Tensor:
            x = torch.randn(batch, sequence, number, head_dim, generator=generator, dtype=torch.float64) * factor
            return x.to(device, dtype)

        self.inputs = {"q": draw(heads, magnitude), "k": draw(key_heads, magnitude), "v": draw(key_heads)}
        self.dout = draw(heads)
        self.causal = causal
        self.cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=device)
        self.cos = self.sin = None
        if rotary_dim:
            frequencies = 10000 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2))
            angles = torch.outer(torch.arange(sequence).float(), frequencies).to(device)
            self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=self.causal, cu_seqlens=self.cu_seqlens, cos=self.cos, sin=self.sin)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By torch's public functions alone, nothing of phi_fast's."""
        sequence, heads = q.shape[1], q.shape[2]
        rows = torch.arange(sequence, device=q.device)
        seen = rows[:, None] >= rows if self.causal else torch.ones(sequence, sequence, dtype=torch.bool).to(q.device)
        if self.cu_seqlens is not None:
            lengths = self.cu_seqlens.diff().long()
            document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
            seen = seen & (document[:, None] == document)
            rows = torch.cat([torch.arange(n, device=q.device) for n in lengths.tolist()])
        q, k = self._rotated(q, rows), self._rotated(k, rows)
        q, k, v = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    def composed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `plain`, in fp32 from a product, a softmax and a product: what the reference is made of."""
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.plain(q.float(), k.float(), v.float()).to(q.dtype)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.cos is None or self.sin is None:
            return x
        half = self.cos.shape[1]
        turn = torch.polar(torch.ones_like(self.cos, dtype=torch.float64), torch.atan2(self.sin, self.cos).double())
        pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn[positions][:, None]
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :].double()), -1).to(x.dtype)


def run(name: str, function: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    with use(name, op="attention"):
        return gradients(function, case.inputs, case.dout)

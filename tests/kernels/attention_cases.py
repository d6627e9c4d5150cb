"""Cases of attention, by phi_fast's op and by torch's public functions alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import gradients
from torch import Tensor

from phi_fast.kernels import use
from phi_fast.kernels.attention import attention

# Ragged ends, every head dim of Triton's, each option alone, and combinations of options.
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
    "1 row of 150 keys": {"sequence": 1, "keys": 150, "batch": 16},
    "70 rows of 130 keys, rotary": {"sequence": 70, "keys": 130, "rotary_dim": 32, "key_heads": 1},
    "130 rows of 67 keys": {"sequence": 130, "keys": 67},
    "70 rows of 131 keys, full": {"sequence": 70, "keys": 131, "causal": False},
    "200 rows, window 40": {"sequence": 200, "window": (40, -1)},
    "150 rows of 90 keys, window on both sides": {"sequence": 150, "keys": 90, "causal": False, "window": (7, 20)},
    "75 rows of 140 keys, window, rotary": {"sequence": 75, "keys": 140, "window": (0, 0), "rotary_dim": 64},
    "130 rows, documents, window, rotary, grouped": {
        "sequence": 130, "documents": [0, 5, 5, 90, 130], "window": (17, 0), "rotary_dim": 32, "key_heads": 1,
    },
    "130 rows, documents, window ahead": {
        "sequence": 130, "causal": False, "documents": [0, 33, 97, 130], "window": (-1, 9),
    },
    "70 rows, head_dim 80": {"sequence": 70, "head_dim": 80},
    "70 rows, head_dim 80, documents, rotary, grouped": {
        "sequence": 70, "head_dim": 80, "documents": [0, 33, 34, 70], "rotary_dim": 32, "key_heads": 1,
    },
    "65 rows of 90 keys, head_dim 96, window, rotary, grouped": {
        "sequence": 65, "keys": 90, "head_dim": 96, "window": (17, 0), "rotary_dim": 64, "key_heads": 1,
    },
    "65 rows, head_dim 96, full": {"sequence": 65, "head_dim": 96, "causal": False},
}  # fmt: skip


class Case:
    """Inputs of one case; calling it runs attention over them by the back end in use."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        *,
        sequence: int,
        keys: int | None = None,
        window: tuple[int, int] | None = None,
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

        keys = sequence if keys is None else keys

        def draw(length: int, number: int, factor: float = 1.0) -> Tensor:
            x = torch.randn(batch, length, number, head_dim, generator=generator, dtype=torch.float64) * factor
            return x.to(device, dtype)

        self.inputs = {
            "q": draw(sequence, heads, magnitude),
            "k": draw(keys, key_heads, magnitude),
            "v": draw(keys, key_heads),
        }
        self.dout = draw(sequence, heads)
        self.causal, self.window = causal, window
        self.cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=device)
        self.cos = self.sin = None
        if rotary_dim:
            frequencies = 10000 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2))
            angles = torch.outer(torch.arange(keys).float(), frequencies).to(device)
            self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"causal": self.causal, "window": self.window, "cu_seqlens": self.cu_seqlens}
        return attention(q, k, v, **options, cos=self.cos, sin=self.sin)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by torch's public functions alone."""
        sequence, heads = q.shape[1], q.shape[2]
        columns = torch.arange(k.shape[1], device=q.device)
        rows = torch.arange(sequence, device=q.device) + k.shape[1] - sequence  # each row's position among the keys
        left, right = self.window or (-1, -1)
        seen = torch.ones(sequence, len(columns), dtype=torch.bool, device=q.device)
        if self.causal:
            seen &= columns <= rows[:, None]
        if left >= 0:
            seen &= columns >= rows[:, None] - left
        if right >= 0:
            seen &= columns <= rows[:, None] + right
        if self.cu_seqlens is not None:
            lengths = self.cu_seqlens.diff().long()
            document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
            seen = seen & (document[:, None] == document)
            rows = columns = torch.cat([torch.arange(n, device=q.device) for n in lengths.tolist()])
        q, k = self._rotated(q, rows), self._rotated(k, columns)
        q, k, v = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return torch.where(seen.any(-1)[:, None], out, 0.0).transpose(1, 2)

    def composed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Like `plain`, but in fp32 from a product, a softmax and a product, as the reference computes it."""
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

"""The key-value cache: keys and values of the tokens that a model has read, so that only new tokens are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PhiConfig


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pad token ids with 0 on the left: ids (batch, longest), and `KeyValueCache.first` (None without padding)."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows], device=device)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    return ids, padding if padding.any() else None


@dataclass
class KeyValueCache:
    """Keys and values of the tokens a model has read: room for `max_length`, filled up to `length`.

    Rows of different lengths are padded on the left: row b's tokens begin at column first[b], and no token attends to
    the columns before it. Positions are column numbers: rotary attention depends only on their differences.
    """

    k: Tensor
    """(layers, batch, max_length, heads, head_dim), rotated."""
    v: Tensor
    """The same for values."""
    first: Tensor | None = None
    """(batch,) int64: number of padding columns on the left of each row; None without padding."""
    length: int = field(default=0)
    """Number of filled columns."""

    @staticmethod
    def allocate(model: nn.Module, batch: int, max_length: int, first: Tensor | None = None) -> KeyValueCache:
        """An empty cache with the model's dtype and device. Raises ValueError if max_length exceeds its context."""
        config, weight = cast(PhiConfig, model.config), next(model.parameters())
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length} exceeds the model's context of {config.max_position_embeddings} tokens"
            )
        shape = (config.num_hidden_layers, batch, max_length, config.num_attention_heads, config.head_dim)
        k, v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KeyValueCache(k, v, first)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v of the new columns; attend from q to all columns up to its own.

        q, k, v and the result are (batch, new, heads, head_dim)."""
        begin, end = self.length, self.length + q.shape[1]
        self.k[layer, :, begin:end] = k
        self.v[layer, :, begin:end] = v
        q, keys, values = (x.transpose(1, 2) for x in (q, self.k[layer, :, :end], self.v[layer, :, :end]))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._visible(begin, end)).transpose(1, 2)

    def _visible(self, begin: int, end: int) -> Tensor | None:
        """Bool (batch or 1, 1, new, end): True where a new column attends to a column. None: to all columns."""
        if self.first is None and end - begin == 1:
            return None
        columns = torch.arange(end, device=self.k.device)
        visible = columns <= columns[begin:, None]  # (new, end)
        if self.first is None:
            return visible[None, None]
        # A padding column attends to itself: a softmax over no column would be NaN.
        own = columns == columns[begin:, None]
        return ((visible & (columns >= self.first[:, None, None])) | own)[:, None]

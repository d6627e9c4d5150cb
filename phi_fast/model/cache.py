"""Keys and values of the tokens that a model has read, so that each new token costs one column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PhiConfig


@dataclass
class KeyValueCache:
    """Keys and values of the tokens a model has read: room for `max_length`, filled up to `length`.

    Rows of different lengths are padded on the left: row b's tokens begin at column first[b], and the columns before it
    are seen by none. Positions are counted in columns: rotary attention sees only their differences.
    """

    k: Tensor
    """(layers, batch, max_length, heads, head_dim), rotated."""
    v: Tensor
    """The same for values."""
    first: Tensor | None = None
    """(batch,) int64: the columns of padding on the left of each row; None where there are none."""
    length: int = field(default=0)
    """Columns filled."""

    @staticmethod
    def allocate(model: nn.Module, batch: int, max_length: int, first: Tensor | None = None) -> KeyValueCache:
        """An empty cache for a phi, in its dtype and on its device. Raises ValueError past the model's context."""
        config, weight = cast(PhiConfig, model.config), next(model.parameters())
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length} is past the model's context of {config.max_position_embeddings} tokens"
            )
        shape = (config.num_hidden_layers, batch, max_length, config.num_attention_heads, config.head_dim)
        k, v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KeyValueCache(k, v, first)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v of the new columns and lets q see all up to its own. All (batch, new, heads, head_dim)."""
        begin, end = self.length, self.length + q.shape[1]
        self.k[layer, :, begin:end] = k
        self.v[layer, :, begin:end] = v
        q, keys, values = (x.transpose(1, 2) for x in (q, self.k[layer, :, :end], self.v[layer, :, :end]))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._visible(begin, end)).transpose(1, 2)

    def _visible(self, begin: int, end: int) -> Tensor | None:
        """Bool (batch or 1, 1, new, end): True where a new column sees a column. None: it sees all."""
        if self.first is None and end - begin == 1:
            return None
        columns = torch.arange(end, device=self.k.device)
        visible = columns <= columns[begin:, None]  # (new, end)
        if self.first is None:
            return visible[None, None]
        # A column of padding sees itself, or its softmax would be over nothing.
        own = columns == columns[begin:, None]
        return ((visible & (columns >= self.first[:, None, None])) | own)[:, None]

"""A cache for texts that begin and end at different times, each of which grows by one token per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KeyValueCache
from .phi import Phi


class SlotCache:
    """Keys and values of up to `slots` texts, each from position 0. Slots 0 … len(self) - 1 are in use.

    Memory: slots × context × layers × 2 × hidden_size numbers of the model's dtype, allocated at once.
    """

    def __init__(self, model: Phi, slots: int) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.slots = model, slots
        shape = (
            config.num_hidden_layers,
            slots,
            config.max_position_embeddings,
            config.num_attention_heads,
            config.head_dim,
        )
        self.k, self.v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.lengths: list[int] = []
        """Number of tokens in each slot in use."""

    def __len__(self) -> int:
        return len(self.lengths)

    @torch.no_grad()
    def add(self, prompt: Sequence[int]) -> Tensor:
        """Read a prompt into slot len(self); return the logits after it, (vocab_size,)."""
        alone = KeyValueCache.allocate(self.model, 1, len(prompt))
        logits = self.model.decode(torch.tensor([list(prompt)], device=self.k.device), alone)
        slot = len(self.lengths)
        self.k[:, slot, : len(prompt)], self.v[:, slot, : len(prompt)] = alone.k[:, 0], alone.v[:, 0]
        self.lengths.append(len(prompt))
        return logits[0]

    def remove(self, slot: int) -> None:
        """Free a slot; the last one moves to its place."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if slot != last:
            self.k[:, slot, :length], self.v[:, slot, :length] = self.k[:, last, :length], self.v[:, last, :length]
            self.lengths[slot] = length

    def clear(self) -> None:
        """Free all slots."""
        self.lengths.clear()

    @torch.no_grad()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one token per slot in use; return the logits after each, (slots in use, vocab_size)."""
        step = _Step(self.k, self.v, self.lengths)
        cos, sin = self.model.cos[step.positions], self.model.sin[step.positions]
        x = self.model.embed_tokens(torch.tensor([list(tokens)], device=self.k.device))  # (1, slots in use, d)
        for i, layer in enumerate(self.model.layers):
            x = layer.decode(x, cos, sin, step, i)  # type: ignore[operator]
        self.lengths = [length + 1 for length in self.lengths]
        return self.model.lm_head(self.model.final_norm(x[0]))


class _Step:
    """One call of `SlotCache.decode`, in the place of the blocks' cache: a new token's place in each slot in use."""

    length = 0
    """First row of the rotary table that a block reads: `decode` gathers the rows of the slots' positions itself."""

    def __init__(self, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
        self.k, self.v = k, v
        self.slots = torch.arange(len(lengths), device=k.device)
        self.positions = torch.tensor(lengths, device=k.device)
        columns = torch.arange(max(lengths) + 1, device=k.device)
        self.visible = (columns <= self.positions[:, None])[:, None, None]  # (slots in use, 1, 1, columns)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v of one new token per slot; attend from q to the slot's own tokens.

        q, k, v and the result are (1, slots in use, heads, head_dim)."""
        self.k[layer, self.slots, self.positions], self.v[layer, self.slots, self.positions] = k[0], v[0]
        used, end = len(self.slots), self.visible.shape[-1]
        keys, values = (x[layer, :used, :end].transpose(1, 2) for x in (self.k, self.v))
        attended = F.scaled_dot_product_attention(q[0][:, :, None], keys, values, attn_mask=self.visible)
        return attended[None, :, :, 0]

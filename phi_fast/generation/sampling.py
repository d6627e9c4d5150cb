"""Chooses the next token from logits: repetition penalty, then greedy or temperature, top-k, top-p, min-p in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings for continuing text."""

    max_new_tokens: int = 256
    """Maximum number of new tokens; fewer if the model ends the text, a stop string appears, or the context is full."""
    temperature: float = 0.0
    """The logits are divided by it; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have at least this probability (arXiv 1904.09751); 1: from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the likeliest token's probability (arXiv 2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Makes tokens that occur in the prompt or the text so far less likely: their logits are divided by it, negative
    ones multiplied (arXiv 1909.05858, CTRL, which uses 1.2); 1: no penalty. It also applies at temperature 0."""
    stop: tuple[str, ...] = ()
    """Strings at which to stop; they are left out of the result."""
    seed: int = 0
    """Random seed for sampling. Prompt i has its own random stream, seeded by (seed, i), so that the result does not
    depend on the batch size."""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1: none"),
            ("stop", all(self.stop), "no empty string"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    def generator(self, prompt: int) -> torch.Generator:
        """Random generator for one prompt, by its number."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + prompt) % 2**63)

    def next_tokens(
        self, logits: Tensor, generators: list[torch.Generator], texts: Sequence[Sequence[int]] = ()
    ) -> list[int]:
        """Choose one token id per row from logits (batch, vocab_size) on any device.

        texts: the ids of each row so far, which `repetition_penalty` needs."""
        if self.repetition_penalty != 1:
            logits = penalised(logits, texts, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        probabilities = filtered_probabilities(logits, self.temperature, self.top_k, self.top_p, self.min_p).cpu()
        draws = (torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True))
        return [int(draw) for draw in draws]


def penalised(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits (batch, vocab_size) in fp32. Those of the tokens that occur in a row's text are divided by `penalty`, or
    multiplied by it where negative, once however often the token occurs (arXiv 1909.05858, section 4.1)."""
    logits = logits.float().clone()
    for row, text in zip(logits, texts, strict=True):
        ids = torch.tensor(sorted(set(text)), device=logits.device)
        row[ids] = torch.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    return logits


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Probabilities (batch, vocab_size) in fp32 after temperature, top-k, top-p and min-p; 0 for excluded tokens."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest token always stays
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    if min_p > 0:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities

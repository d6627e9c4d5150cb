"""The next token from logits: repetition penalty, then greedy, or temperature, top-k, top-p and min-p in that order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How text is continued."""

    max_new_tokens: int = 256
    """Tokens at most; fewer where the model ends the text, a stop string appears, or its context is full."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have at least this probability (arXiv 1904.09751); 1: all."""
    min_p: float = 0.0
    """Draw among tokens that have at least this share of the likeliest one's probability (arXiv 2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that the prompt or the text has, multiplies negative ones (arXiv 1909.05858, CTRL,
    which takes 1.2); 1: none. It also applies at temperature 0."""
    stop: tuple[str, ...] = ()
    """Text at which to stop; it is left out of the result."""
    seed: int = 0
    """Seed of the draws. Prompt i draws from its own stream, seeded by (seed, i): batching changes nothing."""

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
        """The stream of draws of one prompt."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + prompt) % 2**63)

    def next_tokens(
        self, logits: Tensor, generators: list[torch.Generator], texts: Sequence[Sequence[int]] = ()
    ) -> list[int]:
        """logits (batch, vocab_size) on any device -> one token id per row. texts: the ids of each row so far, which
        `repetition_penalty` needs."""
        if self.repetition_penalty != 1:
            logits = penalised(logits, texts, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        probabilities = filtered_probabilities(logits, self.temperature, self.top_k, self.top_p, self.min_p).cpu()
        draws = (torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True))
        return [int(draw) for draw in draws]


def penalised(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits (batch, vocab_size), in fp32, with those of each row's text divided by `penalty`, or multiplied by it
    where they are negative, once for each token that occurs (arXiv 1909.05858, section 4.1)."""
    logits = logits.float().clone()
    for row, text in zip(logits, texts, strict=True):
        ids = torch.tensor(sorted(set(text)), device=logits.device)
        row[ids] = torch.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    return logits


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """(batch, vocab_size) fp32 probabilities after temperature, top-k, top-p and min-p; what is cut off has 0."""
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

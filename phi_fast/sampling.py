"""The next token from logits: greedy, or temperature, top-k and top-p in that order."""

from __future__ import annotations

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
    stop: tuple[str, ...] = ()
    """Text at which to stop; it is left out of the result."""
    seed: int = 0
    """Of the draws. Prompt i draws from its own stream, seeded by (seed, i): batching changes nothing."""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("stop", all(self.stop), "no empty string"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    def generator(self, prompt: int) -> torch.Generator:
        """The stream of draws of one prompt."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + prompt) % 2**63)

    def next_tokens(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """logits (batch, vocab_size) on any device -> one token id a row."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        probabilities = filtered_probabilities(logits, self.temperature, self.top_k, self.top_p).cpu()
        draws = (torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True))
        return [int(draw) for draw in draws]


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(batch, vocab_size) fp32 probabilities after temperature, top-k and top-p; what is cut off has 0."""
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
    return probabilities

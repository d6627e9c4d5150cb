"""Decoding with a key-value cache: continues a batch of prompts by one token per row and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..model.cache import KeyValueCache, pad_left
from ..model.phi import Phi
from .sampling import Sampling


class Decoding:
    """Continues one batch of prompts. Each iteration gives the step's (row, token) pairs; `finish` ends a row.

    A row ends when its token is `end` (None: no token ends a text). All rows end after `max_new_tokens` tokens, or when
    the context is full. `reasons[row]` holds the reason.
    """

    def __init__(
        self,
        model: Phi,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        end: int | None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """numbers: the number of each prompt, for error messages and for its random seed; default: 0, 1, 2, …"""
        context = model.config.max_position_embeddings
        numbers = range(len(prompts)) if numbers is None else numbers
        for number, prompt in zip(numbers, prompts, strict=True):
            if not 0 < len(prompt) < context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens; expected 1 to {context - 1}, one less than the model's "
                    "context"
                )
            if not all(0 <= id < model.config.vocab_size for id in prompt):
                wrong = next(id for id in prompt if not 0 <= id < model.config.vocab_size)
                raise ValueError(
                    f"prompt {number} has token id {wrong}, and the model's vocabulary has {model.config.vocab_size} "
                    "entries: the prompt was encoded with another tokenizer than the model's"
                )
        self.model, self.sampling, self.end = model, sampling, end
        self.texts = [list(prompt) for prompt in prompts]
        """Token ids of each row so far, including its prompt."""
        self.generators = [sampling.generator(number) for number in numbers]
        self.reasons: list[str | None] = [None] * len(prompts)
        self.ids, first = pad_left(prompts, model.lm_head.weight.device)
        longest = self.ids.shape[1]
        self.steps = min(sampling.max_new_tokens, context - longest)
        self.cache = KeyValueCache.allocate(model, len(prompts), longest + self.steps, first)

    def finish(self, row: int, reason: str) -> None:
        self.reasons[row] = self.reasons[row] or reason

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            logits = self.model.decode(self.ids, self.cache)
            tokens = self.sampling.next_tokens(logits, self.generators, self.texts)
            for text, token in zip(self.texts, tokens, strict=True):
                text.append(token)
            live = [(row, token) for row, token in enumerate(tokens) if self.reasons[row] is None]
            for row, token in live:
                if token == self.end:
                    self.finish(row, "end")
                elif step + 1 == self.steps:
                    self.finish(row, "length" if self.steps == self.sampling.max_new_tokens else "context")
            yield live
            if all(self.reasons):
                return
            self.ids = torch.tensor(tokens, device=self.ids.device)[:, None]


def generate(
    model: Phi, prompts: Sequence[Sequence[int]], sampling: Sampling, *, end: int | None = None
) -> list[list[int]]:
    """Continue one batch of prompts, given as token ids, and return the new token ids. Stop strings need `complete`.

    end: the id that ends a text; default: the model's eos_token_id, which may be None. Raises ValueError for a prompt
    that is empty, leaves no room in the model's context, or has an id that the model does not have.
    """
    if sampling.stop:
        raise ValueError("stop strings need a tokenizer: use `complete`")
    new: list[list[int]] = [[] for _ in prompts]
    for step in Decoding(model, prompts, sampling, end=model.config.eos_token_id if end is None else end):
        for row, token in step:
            new[row].append(token)
    return new

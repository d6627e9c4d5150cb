"""Token ids that go on from prompts: a batch with a key-value cache, one token per row and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..model.cache import KeyValueCache
from ..model.phi import Phi
from .sampling import Sampling


class Decoding:
    """One batch of prompts being continued: iterate for (row, token) pairs, a list per step; `finish` ends a row.

    Ends of the texts: rows whose token is `end` finish by themselves (None: no token ends a text), and all do at
    `max_new_tokens` or where the context is full. `reasons[row]` says why.
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
        """numbers: what each prompt is called in errors and in its seed; default: 0, 1, 2, …"""
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
                    "entries: it is of another tokenizer than the model's"
                )
        self.model, self.sampling, self.end = model, sampling, end
        self.texts = [list(prompt) for prompt in prompts]
        """Ids of each row so far, its prompt's included."""
        self.generators = [sampling.generator(number) for number in numbers]
        self.reasons: list[str | None] = [None] * len(prompts)
        longest = max(map(len, prompts))
        self.steps = min(sampling.max_new_tokens, context - longest)
        device = model.lm_head.weight.device
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        first = padding if padding.any() else None
        self.cache = KeyValueCache.allocate(model, len(prompts), longest + self.steps, first)
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.tensor(rows, device=device)

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
    """Token ids in, the new token ids out, for one batch; the library form (stop strings need `complete`).

    end: the id that ends a text; default: the model's eos_token_id, which may be none. Raises ValueError for an empty
    prompt, one that leaves no room in the model's context, or one with an id that the model does not have.
    """
    if sampling.stop:
        raise ValueError("stop strings need a tokenizer: use `complete`")
    new: list[list[int]] = [[] for _ in prompts]
    for step in Decoding(model, prompts, sampling, end=model.config.eos_token_id if end is None else end):
        for row, token in step:
            new[row].append(token)
    return new

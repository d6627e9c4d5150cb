"""Continues prompts as text: streams whole characters, stops at stop strings, and batches prompts by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..model.phi import Phi
from .decode import Decoding
from .sampling import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INCOMPLETE = "�"
"""A decoder's output for bytes that do not (yet) form a character."""


@dataclass(frozen=True)
class Completion:
    """The text generated for one prompt."""

    text: str
    """Without the stop string or the end-of-text token."""
    tokens: list[int]
    """All generated tokens, including the end-of-text token."""
    reason: str
    """"end" (of text), "stop" (string), "length" (max_new_tokens) or "context" (the model's context is full)."""


class TextStream:
    """Turns the tokens of one text into printable text: whole characters, and nothing that may be in a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.text = ""
        """The text so far, up to the stop string."""
        self.stopped = False
        self._released = 0
        self._anchor = 0
        self._decoded = 0  # tokens whose characters are in `text`; those from _anchor give the decoder its left context

    def push(self, token: int, *, last: bool = False) -> str:
        """Add a token; return the text that it completes ("" inside a character or a possible stop string)."""
        self.tokens.append(token)
        known = self.tokenizer.decode(self.tokens[self._anchor : self._decoded])
        whole = self.tokenizer.decode(self.tokens[self._anchor :])
        if not whole.endswith(INCOMPLETE) or last:
            self.text += whole[len(known) :]
            self._anchor, self._decoded = self._decoded, len(self.tokens)
        return self.release(last=last)

    def take(self, token: int, reason: str | None) -> tuple[str, str | None]:
        """Add a token, the last one if there is a reason (see `Completion.reason`); return the new text and the reason,
        which is "stop" once the text has a stop string."""
        if reason == "end":
            self.tokens.append(token)
            new = self.release(last=True)
        else:
            new = self.push(token, last=reason is not None)
        return new, "stop" if self.stopped else reason

    def release(self, *, last: bool = False) -> str:
        """Return the new text that is certainly not part of a stop string; with `last`, all of it."""
        at = min((found for s in self.stop if (found := self.text.find(s)) >= 0), default=-1)
        if at >= 0:
            self.text, self.stopped = self.text[:at], True
        held = 0 if last or self.stopped else self._possible_stop_length()
        new = self.text[self._released : len(self.text) - held]
        self._released += len(new)
        return new

    def _possible_stop_length(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0


def complete(
    model: Phi,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, Completion], None] | None = None,
    end: int | None = None,
) -> list[Completion]:
    """Continue texts, or their token ids, batched by length. Results are in the order of `prompts`, and do not depend
    on the batch size.

    on_text(i, text) is called with each piece of a prompt's text, on_done(i, completion) with each result once its
    batch is done. A prompt that is too long loses tokens on its left, so that max_new_tokens fit into the context; at
    least half a context of it is kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    context = model.config.max_position_embeddings
    keep = max(context - sampling.max_new_tokens, context // 2)
    end = model.config.eos_token_id if end is None else end
    ids = [prompt_ids(model, tokenizer, prompt)[-keep:] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(ids[i]), i))
    results: list[Completion | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        done = _complete_batch(model, tokenizer, [ids[i] for i in batch], batch, sampling, end, on_text)
        for i, completion in zip(batch, done, strict=True):
            results[i] = completion
            if on_done:
                on_done(i, completion)
    return [result for result in results if result is not None]


def prompt_ids(model: Phi, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids as in a training corpus: without the special tokens that a tokenizer may add to a text. An empty text
    becomes the model's beginning-of-text token. Token ids stay as they are."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else list(prompt)
    if ids:
        return ids
    if model.config.bos_token_id is None:
        raise ValueError("a prompt is empty, and this model's tokenizer has no beginning-of-text token: give some text")
    return [model.config.bos_token_id]


def _complete_batch(
    model: Phi,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    numbers: list[int],
    sampling: Sampling,
    end: int | None,
    on_text: Callable[[int, str], None] | None,
) -> list[Completion]:
    decoding = Decoding(model, ids, sampling, end=end, numbers=numbers)
    streams = [TextStream(tokenizer, sampling.stop) for _ in ids]
    for step in decoding:
        for row, token in step:
            new, decoding.reasons[row] = streams[row].take(token, decoding.reasons[row])
            if on_text and new:
                on_text(numbers[row], new)
    return [
        Completion(stream.text, stream.tokens, reason or "length")
        for stream, reason in zip(streams, decoding.reasons, strict=True)
    ]

"""Continuous batching: texts that are asked for at any time join the running batch between two steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.phi import Phi
from ..model.slots import SlotCache
from .sampling import Sampling
from .stream import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LOG = logging.getLogger(__name__)


class Busy(Exception):
    """The queue has no room for a request."""


@dataclass(frozen=True)
class Score:
    """A generated token with its log-probability, before temperature and filters, and the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """The part of a text that one step adds. The last piece has a `reason` (see `Completion.reason`), or an `error`."""

    text: str = ""
    score: Score | None = None
    reason: str | None = None
    error: BaseException | None = None
    tokens: int = 0
    """Number of tokens generated so far."""


@dataclass
class Request:
    """A text to continue. `deliver` is called in the engine's thread with each piece. Set `cancelled` to end early."""

    prompt: Sequence[int]
    """Token ids: 1 to one less than the model's context."""
    sampling: Sampling
    deliver: Callable[[Piece], None]
    number: int = 0
    """Number of the text's random stream, as in `Sampling.generator`."""
    top_logprobs: int | None = None
    """Number of likeliest tokens in each `Piece.score`; None: no scores."""
    cancelled: bool = False


@dataclass
class _Row:
    """A text in a slot."""

    request: Request
    stream: TextStream
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)


class Engine:
    """A thread that continues up to `slots` texts at once, and lets up to `queue` more wait.

    A text does not depend on the others: each has its own positions, its own random stream, and is prefilled alone.
    """

    def __init__(self, model: Phi, tokenizer: Tokenizer, *, slots: int = 8, queue: int = 64) -> None:
        self.model, self.tokenizer, self.queue = model, tokenizer, queue
        self.largest_batch = 0
        """Largest number of texts that one step has continued."""
        self._cache = SlotCache(model, slots)
        self._rows: list[_Row] = []
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none. Raises Busy if more than `queue` would wait for a slot."""
        with self._changed:
            free = self._cache.slots - len(self._rows)
            if self._closing or len(self._waiting) + len(requests) > self.queue + free:
                raise Busy
            self._waiting.extend(requests)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the current step; unfinished texts get an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._closing):
                    self._changed.wait()
                if self._closing:
                    break
            try:
                self._drop_cancelled()
                self._admit()
                if self._rows:
                    self._step()
            except Exception as error:  # such as a device out of memory: its texts end, the engine goes on
                _LOG.exception("a step failed, and ended %d texts", len(self._rows))
                self._fail(error)
        with self._changed:
            unseen = [*self._waiting]
            self._waiting.clear()
        for request in unseen:
            request.deliver(Piece(error=RuntimeError("the server is shutting down")))
        self._fail(RuntimeError("the server is shutting down"))

    def _fail(self, error: BaseException) -> None:
        rows, self._rows = self._rows, []
        self._cache.clear()
        for row in rows:
            row.request.deliver(Piece(error=error))

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].request.cancelled:
                self._remove(slot)

    def _admit(self) -> None:
        """Prefill waiting texts into the free slots."""
        while len(self._rows) < self._cache.slots:
            with self._changed:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
                stream = TextStream(self.tokenizer, request.sampling.stop)
                row = _Row(request, stream, request.sampling.generator(request.number), list(request.prompt))
                self._rows.append(row)
            logits = self._cache.add(request.prompt)
            self._advance(len(self._rows) - 1, logits)

    def _step(self) -> None:
        self.largest_batch = max(self.largest_batch, len(self._rows))
        logits = self._cache.decode([row.ids[-1] for row in self._rows])
        for slot in reversed(range(len(self._rows))):  # `_remove` moves only a row that is done
            self._advance(slot, logits[slot])

    def _remove(self, slot: int) -> None:
        with self._changed:
            last = self._rows.pop()
            if slot < len(self._rows):
                self._rows[slot] = last
        self._cache.remove(slot)

    def _advance(self, slot: int, logits: Tensor) -> None:
        """Choose a row's next token, deliver what it adds, and free the slot of a text that ends."""
        row = self._rows[slot]
        request, sampling, stream = row.request, row.request.sampling, row.stream
        (token,) = sampling.next_tokens(logits[None], [row.generator], [row.ids])
        row.ids.append(token)
        new = len(row.ids) - len(request.prompt)
        reason: str | None = None
        if token == self.model.config.eos_token_id:
            reason = "end"
        elif new == sampling.max_new_tokens:
            reason = "length"
        elif len(row.ids) == self.model.config.max_position_embeddings:
            reason = "context"
        text, reason = stream.take(token, reason)
        score = None if request.top_logprobs is None else _score(logits, token, request.top_logprobs)
        if reason is not None:
            self._remove(slot)
        request.deliver(Piece(text, score, reason, tokens=new))


def _score(logits: Tensor, token: int, top: int) -> Score:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(top)
    return Score(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

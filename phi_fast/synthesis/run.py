"""Completes prompts until all are answered, the budget is spent, or enough documents are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import Claim
from .client import Client, Request, ServerError
from .journal import Answer
from .prompts import Prompts
from .state import State, check_plan

REFUSED_AT_FIRST = 10
"""A server that refuses this many requests before it completes one is taken to refuse all."""
CHARACTERS_PER_TOKEN = 4
"""Typical of English prose: estimates the tokens of a prompt before the server has counted them."""
_LINE_EVERY = 5.0
"""Seconds between two lines about the progress."""


@dataclass(frozen=True)
class Limits:
    """When to stop, and how much to ask for at once."""

    tokens: int
    """Budget: prompt and completion tokens of all runs in one directory, as the server counts them."""
    concurrency: int = 16
    """Maximum number of requests at the same time."""
    documents: int | None = None
    """Stop when this many documents are kept; None for no such limit."""

    def check(self) -> None:
        """Raise UsageError for values that are out of range."""
        for option, value in (
            ("--max-tokens-total", self.tokens),
            ("--concurrency", self.concurrency),
            ("--documents", self.documents),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value}: expected at least 1")


def synthesize(
    directory: Path,
    prompts: Prompts,
    request: Request,
    limits: Limits,
    *,
    similarity: float = 0.7,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Complete the prompts into `directory`, or go on with what it holds. Returns the report.

    `directory`/documents.jsonl and report.json are written at the end, also after a server's failure or Ctrl-C; after
    a kill, the same call makes them from the journal, in which every finished completion is.

    similarity: from which Jaccard similarity of word 5-grams on a text is dropped as a near-duplicate of one before.
    tell: called with lines about the progress.
    Raises UsageError for values out of range, a directory begun with other prompts or settings, or one in use by
    another process; ServerError if the server fails; OSError.
    """
    limits.check()
    client = Client(request)  # before anything is written: the package may be missing
    directory.mkdir(parents=True, exist_ok=True)
    with Claim.take(directory / "lock", str(directory), way_out="wait for it, or name another --out"):
        plan = prompts.identity() | {
            name: value for name, value in asdict(request).items() if name in _OF_THE_COMPLETIONS
        }
        check_plan(directory, plan)
        with State(directory, prompts, similarity) as state:
            if state.totals.tokens:
                tell(f"{directory} has {_status(state)} from before")
            run = _Run(state, client, limits, tell)
            ended = "interrupted"
            try:
                ended = asyncio.run(run.complete())
            except ServerError:
                ended = "the server failed"
                raise
            finally:
                report = _write(state, request, limits, similarity, ended, run.seconds())
    return report


_OF_THE_COMPLETIONS = ("model", "api", "max_tokens", "temperature", "top_p")
"""Fields of Request that determine the completions; the others may change when a run is resumed."""


class _Run:
    """One pass over the prompts without an answer."""

    def __init__(self, state: State, client: Client, limits: Limits, tell: Callable[[str], None]) -> None:
        self.state, self.client, self.limits, self.tell = state, client, limits, tell
        self._start = self._last_line = time.monotonic()
        self._before = state.totals.completed

    async def complete(self) -> str:
        """Returns why it ended. Raises ServerError, after the requests in flight were given `timeout` to end."""
        async with self.client:
            running: dict[asyncio.Task[Answer], int] = {}
            try:
                return await self._complete(running)
            except ServerError:
                if running:
                    self.tell(f"waiting for {len(running)} requests in flight")
                    for task in (await asyncio.wait(running, timeout=self.client.request.timeout))[0]:
                        if task.exception() is None:
                            self.state.take(task.result())
                raise
            finally:
                for task in running:
                    task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.gather(*running, return_exceptions=True)

    async def _complete(self, running: dict[asyncio.Task[Answer], int]) -> str:
        """running: filled with the requests in flight, each with the tokens that it may take."""
        unanswered = self.state.unanswered()
        ended = ""
        while True:
            while not ended and len(running) < self.limits.concurrency and not self._must_wait(running.values()):
                number = next(unanswered, None)
                if number is None:
                    ended = "all prompts are answered"
                else:
                    prompt = self.state.prompts[number]
                    most = self.client.request.max_tokens + len(prompt.text) // CHARACTERS_PER_TOKEN
                    running[asyncio.create_task(self.client.answer(prompt))] = most
            if not running:
                self._check_refusals(1)
                return ended or self._must_wait([])
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del running[task]
            failures = [error for task in done if (error := task.exception()) is not None]
            for task in done:
                if task.exception() is None:
                    self.state.take(task.result())
            if failures:
                raise failures[0]
            self._check_refusals(REFUSED_AT_FIRST)
            if time.monotonic() - self._last_line > _LINE_EVERY:
                self._last_line = time.monotonic()
                self.tell(_status(self.state) + f", {len(running)} in flight, {self._speed()}")

    def _must_wait(self, running: Collection[int]) -> str:
        """Why no further request may start; empty if one may. running: tokens that each one in flight may take.

        The requests in flight count as if they were finished, so that only the last one to start can go beyond the
        budget (and prompts of more tokens than their characters suggest).
        """
        if self.state.totals.tokens + sum(running) >= self.limits.tokens:
            return "the budget is spent"
        wanted, kept = self.limits.documents, len(self.state.kept)
        if wanted is not None and kept >= wanted:
            return "the documents asked for are there"
        # With none in flight, an answer before all undecided ones is missing, and must be asked for.
        if wanted is not None and running and kept + self.state.undecided + len(running) >= wanted:
            return "the answers that may be documents are enough"
        return ""

    def _check_refusals(self, least: int) -> None:
        """Raise ServerError if the server refused at least this many prompts and completed none."""
        totals = self.state.totals
        if not totals.completed and totals.refused >= least:
            raise ServerError(
                f"the server at {self.client.request.base_url} refused the first {totals.refused} prompts "
                f"({totals.first_refusal}): correct what it names, and name another --out"
            )

    def _speed(self) -> str:
        rate = (self.state.totals.completed - self._before) / max(self.seconds(), 1e-6)
        return f"{rate:.2f} completions/s"

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start


def _status(state: State) -> str:
    totals = state.totals
    dropped = sum(state.dropped.values())
    return (
        f"{totals.completed:,} completions of {len(state.prompts):,} prompts, {totals.tokens:,} tokens, "
        f"{len(state.kept):,} kept, {dropped:,} dropped, {totals.refused:,} refused"
    )


def _write(
    state: State, request: Request, limits: Limits, similarity: float, ended: str, seconds: float
) -> dict[str, Any]:
    totals = state.totals
    state.write_documents(limits.documents, request.model)
    fields = {
        "ended": ended,
        "seconds_of_this_run": round(seconds, 1),
        "tokens": {
            "prompt": totals.prompt_tokens,
            "completion": totals.completion_tokens,
            "total": totals.tokens,
            "budget": limits.tokens,
            "over_budget": max(0, totals.tokens - limits.tokens),
        },
        "settings": {
            **{name: value for name, value in asdict(request).items() if name != "api_key"},
            **state.prompts.identity(),
            "concurrency": limits.concurrency,
            "duplicate_similarity": similarity,
        },
    }
    return state.write_report(fields, limits.documents)

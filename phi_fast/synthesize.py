"""`python -m phi_fast.synthesize --topics FILE --base-url URL --model NAME --out DIR`: synthetic textbooks.

Asks any server with OpenAI's API (vLLM, `phi_fast.generate --serve`, …) for texts about each topic, for several
audiences and in several styles, as Cosmopedia and phi-1.5 describe. DIR/documents.jsonl is read by phi_fast.prepare.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.synthesize")

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from .errors import PhiFastError, UsageError
from .files import check_names
from .startup import tolerate_encodings
from .synthesis.client import Api, Request
from .synthesis.prompts import AUDIENCES, STYLES, Prompts
from .synthesis.run import Limits, synthesize
from .synthesis.sources import read_pages, read_topics
from .synthesis.state import DOCUMENTS
from .terminal import console, printable


@dataclass(frozen=True)
class Options:
    """Have a model write textbooks, and keep what is diverse."""

    topics: Path
    """File with one topic per line, or JSONL with a field "topic"."""
    base_url: str
    """The server's address with its version, for example http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model, as the server lists it at /v1/models."""
    out: Path
    """Directory of the results. The same command goes on with what it holds."""
    max_tokens_total: int
    """Budget in tokens, prompts included, over all runs into --out, counted by the server's `usage`."""
    documents: int | None = None
    """Stop when this many documents are kept. None: when all prompts are answered or the budget is spent."""
    pages: Path | None = None
    """JSONL with web pages in --text-field: each prompt quotes the beginning of one, for diversity."""
    text_field: str = "text"
    """Field of --pages that holds the text."""
    audiences: tuple[str, ...] = tuple(AUDIENCES)
    """Whom the texts are for."""
    styles: tuple[str, ...] = tuple(STYLES)
    """Kinds of texts."""
    repeats: int = 1
    """Number of prompts per topic, audience and style; each has its own sampling seed and page."""
    seed: int = 0
    """Random seed of the order of the prompts, of their pages and of the server's sampling."""
    api: Api = "chat"
    """chat: /v1/chat/completions, for models tuned on instructions. completions: /v1/completions, for base models."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; a server without keys needs none."""
    max_tokens: int = 1024
    """Maximum number of tokens of a text."""
    temperature: float = 0.8
    """Temperature of the sampling, 0 to 2."""
    top_p: float = 0.95
    """The sampling takes the likeliest tokens up to this sum of probabilities, above 0 up to 1."""
    concurrency: int = 16
    """Maximum number of requests at the same time."""
    retries: int = 6
    """How often a request is sent again after a dropped connection, a timeout, or a status of 408, 409, 429 or 5xx.
    The pauses are what the server's Retry-After asks for, else 0.5 s doubled up to 8 s."""
    timeout: float = 600.0
    """Seconds that the server may take to answer one request."""
    duplicate_similarity: float = 0.7
    """A text is dropped from this Jaccard similarity of word 5-grams with an earlier one on, estimated by MinHash."""

    def check(self) -> None:
        """Raise UsageError for values that are out of range."""
        check_names(self)
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"--base-url {self.base_url}: expected an address such as http://127.0.0.1:8000/v1")
        for name, value, good, expected in (
            ("max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 2, "0 to 2"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 up to 1"),
            ("retries", self.retries, self.retries >= 0, "0 or more"),
            ("timeout", self.timeout, 0 < self.timeout < float("inf"), "a number of seconds above 0"),
        ):
            if not good:
                raise UsageError(f"--{name} {value}: expected {expected}")


def run(options: Options) -> dict[str, Any]:
    """Carry out the options. Returns the report; raises UsageError and OSError."""
    options.check()
    output = console(soft_wrap=True)
    prompts = Prompts(
        read_topics(options.topics),
        options.audiences,
        options.styles,
        () if options.pages is None else read_pages(options.pages, options.text_field),
        options.repeats,
        options.seed,
    )
    request = Request(
        options.base_url,
        options.model,
        options.api,
        os.environ.get(options.api_key_env) or "none",
        options.max_tokens,
        options.temperature,
        options.top_p,
        options.timeout,
        options.retries,
    )
    limits = Limits(options.max_tokens_total, options.concurrency, options.documents)
    return synthesize(
        options.out,
        prompts,
        request,
        limits,
        similarity=options.duplicate_similarity,
        tell=lambda line: output.print(printable(line)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 after an error, 130 after Ctrl-C."""
    tolerate_encodings()
    options = tyro.cli(Options, args=arguments, prog="python -m phi_fast.synthesize", description=__doc__)
    try:
        report = run(options)
    except (PhiFastError, OSError) as error:
        print(f"phi_fast.synthesize: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nphi_fast.synthesize: stopped. The same command takes up where this one was.", file=sys.stderr)
        return 130
    output, tokens = console(soft_wrap=True), report["tokens"]
    over = f", {tokens['over_budget']:,} over the budget" if tokens["over_budget"] else ""
    output.print(f"{report['ended']}: {tokens['total']:,} of {tokens['budget']:,} tokens{over}")
    output.print(printable(f"written: {options.out / DOCUMENTS}, {report['documents']['kept']:,} documents"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Asks an OpenAI-compatible server for one completion at a time, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError
from .journal import Answer
from .prompts import Prompt

Api = Literal["chat", "completions"]

BAD_BODIES = 3
"""How often a prompt is sent again after a response of status 200 whose body cannot be used."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before a prompt is sent again after such a response: doubled each time."""
_REFUSALS = {400, 413, 422}
"""Statuses of requests that are refused because of what they ask for, such as a prompt that is too long."""


class ServerError(UsageError):
    """The server cannot be used; the message says what it answered and what to do."""


@dataclass(frozen=True)
class Request:
    """What every request has in common."""

    base_url: str
    model: str
    api: Api = "chat"
    """chat: /v1/chat/completions, for models tuned on instructions. completions: /v1/completions, for base models."""
    api_key: str = "none"
    max_tokens: int = 1024
    """Maximum number of tokens of a completion."""
    temperature: float = 0.8
    top_p: float = 0.95
    timeout: float = 600.0
    """Seconds that the server may take to answer."""
    retries: int = 6
    """How often a request is sent again after a dropped connection, a timeout or a status of 408, 409, 429 or 5xx."""


class Client:
    """Completes prompts. Use it as an asynchronous context manager."""

    def __init__(self, request: Request) -> None:
        """Raises UsageError if the package `openai` is missing."""
        if importlib.util.find_spec("openai") is None:
            raise UsageError("phi_fast.synthesize needs openai: pip install 'phi-fast[synthesize]'")
        import openai

        self.request, self._openai = request, openai
        self._client = openai.AsyncOpenAI(
            base_url=request.base_url, api_key=request.api_key, max_retries=request.retries, timeout=request.timeout
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def answer(self, prompt: Prompt) -> Answer:
        """Ask for the completion of a prompt.

        The client waits between attempts as the server's Retry-After says, up to two minutes, else with exponential
        backoff. A refusal of this one request is an answer. Raises ServerError for everything else that fails.
        """
        for attempt in range(BAD_BODIES + 1):
            try:
                return self._read(prompt, await self._send(prompt))
            except _BadBodyError as error:
                if attempt == BAD_BODIES:
                    raise ServerError(f"{self._where()} answered {BAD_BODIES + 1} times with {error}") from error
            await asyncio.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    async def _send(self, prompt: Prompt) -> Any:
        """The parsed response, or the refusal of the request as an exception of the client's.

        Raises ServerError, and _BadBodyError for a body that is not JSON.
        """
        openai, options = self._openai, self.request
        settings: dict[str, Any] = {
            "model": options.model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": prompt.seed,
        }
        try:
            if options.api == "completions":
                return await self._client.completions.create(prompt=prompt.text + "\n\n", **settings)
            messages: Any = [{"role": "user", "content": prompt.text}]
            return await self._client.chat.completions.create(messages=messages, **settings)
        except openai.APIStatusError as error:
            if error.status_code in _REFUSALS:
                return error
            raise ServerError(self._status(error)) from error
        except openai.APITimeoutError as error:
            raise ServerError(
                f"{self._where()} did not answer within {options.timeout:g} s, {self._attempts()}: raise --timeout, or "
                "lower --concurrency or --max-tokens"
            ) from error
        except openai.APIConnectionError as error:
            raise ServerError(
                f"{self._where()} cannot be reached or ended the connection, {self._attempts()} "
                f"({error.__cause__ or error}): see whether the server runs"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError) as error:
            raise _BadBodyError(f"a body that is not JSON ({error})") from error

    def _read(self, prompt: Prompt, response: Any) -> Answer:
        """The answer in a response. Raises _BadBodyError, and ServerError if the server does not count tokens."""
        if isinstance(response, self._openai.APIStatusError):
            return Answer(prompt.number, "refused", response.message, "refused", 0, 0)
        choices = getattr(response, "choices", None)
        if not isinstance(choices, list) or len(choices) != 1:
            raise _BadBodyError(f"a body without exactly one of `choices`: {str(response)[:200]!r}")
        choice = choices[0]
        text = getattr(choice, "text", None)
        if self.request.api == "chat":
            message = getattr(choice, "message", None)
            text = getattr(message, "content", None)
            text = "" if text is None and message is not None else text
        if not isinstance(text, str):
            raise _BadBodyError(f"a choice without a text: {str(choice)[:200]!r}")
        usage = getattr(response, "usage", None)
        before, new = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        if not (isinstance(before, int) and isinstance(new, int) and before >= 0 and new >= 0):
            raise ServerError(
                f"{self._where()} does not report `usage` (prompt_tokens, completion_tokens), by which the budget of "
                "--max-tokens-total is counted: switch its usage statistics on, or use another server"
            )
        finish = getattr(choice, "finish_reason", None)
        return Answer(prompt.number, "completed", text, finish if isinstance(finish, str) else "", before, new)

    def _status(self, error: Any) -> str:
        status, pause = error.status_code, error.response.headers.get("retry-after")
        way_out = {
            401: "set the key in the environment variable that --api-key-env names",
            403: "the key may not use this model; set another one in the variable that --api-key-env names",
            404: f"see whether --base-url ends in /v1, --api fits, and the server has a model {self.request.model!r}",
            429: f"lower --concurrency, or wait{f' (Retry-After: {pause})' if pause else ''}",
        }.get(status, "see the server's log" if status >= 500 else "see what the server expects")
        tried = error.response.request.headers.get("x-stainless-retry-count", "0")
        times = f", {int(tried) + 1} times" if tried.isdigit() and int(tried) else ""
        return f"{self._where()} answered with status {status}{times} ({error.message[:500]}): {way_out}"

    def _attempts(self) -> str:
        return f"{self.request.retries + 1} times"

    def _where(self) -> str:
        return f"the server at {self.request.base_url}"


class _BadBodyError(Exception):
    """A response of status 200 that cannot be used; the message completes "answered with"."""

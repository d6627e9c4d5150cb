"""The ASGI application: /v1/models, /v1/completions and /v1/chat/completions on one `Engine`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from secrets import randbelow
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from ..generation.engine import Busy, Engine, Piece, Request
from ..generation.sampling import Sampling
from ..generation.stream import prompt_ids
from .replies import ChatReply, CompletionReply, Reply, Text
from .wire import MOST_CHOICES, ApiError, ChatRequest, CompletionRequest, parse

MAX_BODY_BYTES = 4 * 2**20
CLIENT_GONE = 499
"""Status in the log for a client that left; nobody receives it."""


@dataclass(frozen=True)
class Served:
    """Model, settings and chat format that the application serves."""

    engine: Engine
    name: str
    """The model's name in requests and replies."""
    defaults: Sampling
    """Settings for what a request leaves out."""
    chat_prompt: Callable[[Sequence[dict[str, str]]], str]
    """Renders messages up to where the answer begins. Raises ValueError for messages that it rejects."""
    chat_stop: tuple[str, ...]
    """Texts that end an answer."""
    created: int
    """Unix time at which the server started."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        return self.engine.model.config.max_position_embeddings


def make_app(served: Served) -> Starlette:
    """Make the application; the engine is closed when the server shuts down."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.engine.close)

    async def models(http: HttpRequest) -> Response:
        model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "phi_fast"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(http: HttpRequest) -> Response:
        request = parse(CompletionRequest, await _body(http))
        prompts = [await asyncio.to_thread(_encode, served, prompt) for prompt in _prompts(request)]
        reply = CompletionReply(served.name, served.tokenizer, sum(map(len, prompts)))
        return await _answer(served, http, request, prompts, (), reply)

    async def chat(http: HttpRequest) -> Response:
        request = parse(ChatRequest, await _body(http))
        try:
            prompt = served.chat_prompt([message.plain() for message in request.messages])
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        ids = await asyncio.to_thread(_encode, served, prompt)
        reply = ChatReply(served.name, served.tokenizer, len(ids))
        return await _answer(served, http, request, [ids], served.chat_stop, reply)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        lifespan=lifespan,
    )


async def _body(http: HttpRequest) -> bytes:
    """The body of a request, which must be declared as JSON: a web page elsewhere cannot send such a request."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected the header Content-Type: application/json")
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt: Any = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: expected a text, token ids, or a list of them that is not empty", param="prompt")
    return [prompt] if isinstance(prompt[0], int) else prompt


def _encode(served: Served, prompt: str | list[int]) -> list[int]:
    model = served.engine.model
    try:
        ids = prompt_ids(model, served.tokenizer, prompt)
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt") from None
    wrong = next((id for id in ids if not 0 <= id < model.config.vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"token id {wrong}: the model has {model.config.vocab_size} ids", param="prompt")
    return ids


def _room(served: Served, prompt: list[int], limit: int | None) -> int:
    """Number of new tokens for a prompt. Raises ApiError if they do not fit into the model's context."""
    room = served.context - len(prompt)
    if room < 1 or (limit or 0) > room:
        asked = f" and {limit} new ones" if limit else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {served.context} tokens, and the request has {len(prompt)} "
            f"tokens{asked}: shorten it or lower max_tokens",
            param="prompt" if room < 1 else "max_tokens",
            code="context_length_exceeded",
        )
    return limit or min(room, served.defaults.max_new_tokens)


async def _answer(
    served: Served,
    http: HttpRequest,
    request: CompletionRequest | ChatRequest,
    prompts: list[list[int]],
    stop: tuple[str, ...],
    reply: Reply,
) -> Response:
    if request.model not in (None, served.name):
        raise ApiError(404, f"the model {request.model!r} is not served, {served.name!r} is", code="model_not_found")
    n = request.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts × n={n}: expected at most {MOST_CHOICES}", param="n")
    pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(index: int, piece: Piece) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

    # One for all choices, which differ by their number.
    seed = randbelow(2**62) if request.seed is None else request.seed
    asked = [prompt for prompt in prompts for _ in range(n)]
    requests = [
        Request(
            prompt,
            request.sampling(served.defaults, _room(served, prompt, request.limit), stop, seed),
            partial(deliver, i),
            i,
            request.top,
        )
        for i, prompt in enumerate(asked)
    ]
    try:
        served.engine.submit(requests)
    except Busy:
        raise ApiError(429, "the queue is full: try again later", code="queue_full") from None
    texts = [Text() for _ in requests]
    if request.stream:
        usage = request.stream_options is not None and request.stream_options.include_usage
        return _Stream(_events(reply, pieces, texts, usage), requests)
    try:
        finished = await _while_connected(http, _collect(pieces, texts))
    finally:
        _cancel(requests)
    return JSONResponse(reply.whole(texts)) if finished else Response(status_code=CLIENT_GONE)


def _cancel(requests: Sequence[Request]) -> None:
    for request in requests:
        request.cancelled = True


async def _pieces(pieces: asyncio.Queue[tuple[int, Piece]], texts: list[Text]) -> AsyncIterator[tuple[int, Piece, int]]:
    """Yield (index, piece, characters before it) until all texts are complete. Raises ApiError if one fails."""
    while any(text.reason is None for text in texts):
        index, piece = await pieces.get()
        if piece.error is not None:
            raise ApiError(500, f"the text could not be continued: {piece.error}")
        before = len(texts[index].text)
        texts[index].add(piece)
        yield index, piece, before


async def _collect(pieces: asyncio.Queue[tuple[int, Piece]], texts: list[Text]) -> None:
    async for _ in _pieces(pieces, texts):
        pass


async def _while_connected(http: HttpRequest, work: Any) -> bool:
    """Run `work` until it is done (True), or the client has gone (False)."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
        leaving.cancel()


async def _events(
    reply: Reply, pieces: asyncio.Queue[tuple[int, Piece]], texts: list[Text], usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    for index in range(len(texts)):
        if (start := reply.start(index)) is not None:
            yield _event(start)
    try:
        async for index, piece, before in _pieces(pieces, texts):
            if piece.text or piece.score or piece.reason:
                yield _event(reply.chunk(index, piece, before))
    except ApiError as error:  # the status is already sent
        yield _event(error.body())
        return
    if usage:
        yield _event(reply.last(texts))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """A stream of events that ends its texts when it ends, also when the client goes."""

    def __init__(self, events: AsyncIterator[str], requests: Sequence[Request]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._requests)


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

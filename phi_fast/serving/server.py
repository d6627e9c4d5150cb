"""Starts and ends the HTTP server."""

from __future__ import annotations

import importlib.util
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

from tokenizers import Tokenizer

from ..data.chat import ChatFiles, render, require_transformers
from ..errors import UsageError
from ..generation.dialogue import Named
from ..generation.engine import Engine
from ..generation.sampling import Sampling
from ..model.phi import Phi

GRACE_SECONDS = 30
"""Seconds that running requests may take to finish after the server was told to end."""
_PACKAGES = ("starlette", "uvicorn")


def listen(host: str, port: int) -> socket.socket:
    """Open the server's socket, which a client can connect to from now on; port 0: any free one.

    Raises UsageError if the packages of the extra `serve` are missing, or the address cannot be used.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--serve needs {', '.join(missing)}: pip install 'phi-fast[serve]'")
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port}: expected 0 (any free port) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        result = socket.socket(family, socket.SOCK_STREAM)
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        result.bind(address)
        result.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {host} --port {port} cannot be listened on: {reason}. Name another --port, or 0 for any"
        ) from error
    return result


def serve(
    listening: socket.socket,
    model: Phi,
    tokenizer: Tokenizer,
    *,
    name: str,
    template: ChatFiles | None,
    people: tuple[str, str],
    defaults: Sampling,
    slots: int,
    queue: int,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve the model until SIGTERM or SIGINT, after which running requests may finish for `GRACE_SECONDS`.

    template: the model's chat template; None: a chat is a dialogue between `people`, the user and the model. slots,
    queue: see `Engine`. tell(line) is called with the address, and with a warning if other machines can reach it.
    Raises KeyboardInterrupt at the end if it was SIGINT.
    """
    import uvicorn

    from .app import Served, make_app

    chat_prompt, chat_stop = _chat(template, tokenizer, people)
    engine = Engine(model, tokenizer, slots=slots, queue=queue)
    created = int(time.time())
    app = make_app(Served(engine, name, defaults, chat_prompt, chat_stop, created))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS, ws="none")
    host, port = listening.getsockname()[:2]
    tell(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends")
    if not ipaddress.ip_address(host).is_loopback:
        tell(f"warning: other machines can reach {host}, and the server asks for no password")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it has ended
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        engine.close()


def _chat(
    template: ChatFiles | None, tokenizer: Tokenizer, people: tuple[str, str]
) -> tuple[Callable[[Sequence[dict[str, str]]], str], tuple[str, ...]]:
    """Return the function that renders messages as a prompt, and the texts that end an answer."""
    if template is None:
        return partial(named_prompt, people), Named(*people).stop
    require_transformers("a chat by the model's chat template")
    return partial(render, template.on(tokenizer), answer=True), ()


def named_prompt(people: tuple[str, str], messages: Sequence[dict[str, str]]) -> str:
    """Render messages as a dialogue between two people, as `generate --chat` does; a system message is a line before.

    Raises ValueError for another role.
    """
    user, assistant = people
    lines = []
    for message in messages:
        role, text = message["role"], message["content"].strip()
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"the role {role!r} is none of system, user and assistant")
        lines.append(text if role == "system" else f"{user if role == 'user' else assistant}: {text}")
    return "\n".join([*lines, f"{assistant}:"])

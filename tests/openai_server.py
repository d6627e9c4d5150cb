"""A server with OpenAI's API on this machine whose texts depend only on the prompt, and that fails as it is told."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = [f"word{i}" for i in range(2000)]


def text_of(prompt: str, words: int = 60) -> str:
    generator = random.Random(hashlib.sha256(prompt.encode()).digest())
    return " ".join(generator.choices(WORDS, k=words))


def body_of(prompt: str, text: str, kind: str = "chat", finish: str = "stop") -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, **choice}],
        "usage": {
            "prompt_tokens": len(prompt.split()),
            "completion_tokens": len(text.split()),
            "total_tokens": len(prompt.split()) + len(text.split()),
        },
    }


class Server:
    """`behave(handler, prompt, attempt)` may answer instead of the server; it returns whether it did."""

    def __init__(self, behave: Callable[[Any, str, int], bool] = lambda *_: False, text: Any = text_of) -> None:
        self.behave, self.text = behave, text
        self.attempts: Counter[str] = Counter()
        self.answered: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[tuple[str, float]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.kind = "chat" if self.path == "/v1/chat/completions" else "completions"
                prompt = request["messages"][0]["content"] if self.kind == "chat" else request["prompt"]
                with outer._lock:
                    outer.requests.append(request)
                    outer.attempts[prompt] += 1
                    attempt = outer.attempts[prompt]
                    outer.times.append((prompt, time.monotonic()))
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    if not outer.behave(self, prompt, attempt):
                        self.reply(body_of(prompt, outer.text(prompt), self.kind))
                        outer.answered.append(prompt)
                finally:
                    with outer._lock:
                        outer._at_once -= 1

            def reply(self, body: Any, status: int = 200, **headers: str) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def drop(self, *, part: bool = False) -> None:
                """End the connection, after a part of a body if asked."""
                if part:
                    self.wfile.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
                    )
                self.close_connection = True
                self.connection.shutdown(2)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

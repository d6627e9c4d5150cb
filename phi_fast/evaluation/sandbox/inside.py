"""Runs inside the sandbox, as the text of `python -c`: a program, or a candidate and the tests that judge it.

A candidate's code runs in a process of its own. The tests run in another, where each of the candidate's functions is
a stand-in that sends the arguments over a pipe and receives the result as plain data: numbers, text, bytes, None, and
lists, tuples, dicts, sets and iterators of them. So the tests never compare an object whose `__eq__` is always true,
and no frame of the candidate's process leads to the token that proves a pass. Standard library only.
"""

import builtins
import json
import os
import sys
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

TOKEN_IN, TOKEN_OUT = 3, 4  # file descriptors from the supervisor
SEQUENCES: dict[type, Callable[[Any], Iterator[Any]]] = {
    list: list.__iter__,
    tuple: tuple.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
}


def main() -> None:
    sys.set_int_max_str_digits(0)
    program = json.loads(Path("program.json").read_text(encoding="utf-8"))
    if "tests" not in program:
        token = read_token()
        exec(compile(program["source"], "program.py", "exec"), {"__name__": "__main__"})
    else:
        candidate = Candidate(program["source"])
        token = read_token()
        scope = {"__name__": "__main__"}
        exec(compile(program["given"], "given.py", "exec"), scope)
        scope |= {name: candidate.function(name) for name in program["functions"]}
        exec(compile(program["tests"], "tests.py", "exec"), scope)
        candidate.end()
    os.write(TOKEN_OUT, token)


def read_token() -> bytes:
    token = os.read(TOKEN_IN, 64)
    os.close(TOKEN_IN)
    return token


class CandidateError(Exception):
    """The candidate raised an exception that is not built in, or its process has ended."""


class Candidate:
    """Starts the candidate's process and calls its functions."""

    def __init__(self, source: str) -> None:
        requests, requests_end = os.pipe()
        answers, answers_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for end in (TOKEN_IN, TOKEN_OUT, requests_end, answers):
                os.close(end)
            try:
                serve(source, os.fdopen(requests, "rb"), os.fdopen(answers_end, "wb"))
            finally:
                sys.stdout.flush()
                os._exit(1)
        os.close(requests)
        os.close(answers_end)
        self.requests, self.answers = os.fdopen(requests_end, "wb"), os.fdopen(answers, "rb")
        self.result()  # waits until its source has run

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            send(self.requests, [name, to_plain(list(arguments)), to_plain(keywords)])
            return self.result()

        call.__name__ = name
        return call

    def result(self) -> Any:
        line = self.answers.readline()
        if not line:
            raise CandidateError("the candidate's process has ended")
        kind, value = json.loads(line)
        if kind == "value":
            return from_plain(value)
        error = getattr(builtins, str(kind), None)
        if isinstance(error, type) and issubclass(error, Exception):
            raise error(value)
        raise CandidateError(f"{kind}: {value}")

    def end(self) -> None:
        self.requests.close()
        os.waitpid(self.pid, 0)


def serve(source: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Run the source in the candidate's process, then answer calls until the pipe is closed."""
    scope: dict[str, Any] = {"__name__": "__main__"}

    def answer(action: Callable[[], Any]) -> None:
        try:
            message = ["value", to_plain(action())]
        except Exception as error:
            message = [type(error).__name__, str(error)]
        sys.stdout.flush()
        send(answers, message)

    answer(lambda: exec(compile(source, "program.py", "exec"), scope))
    for line in requests:
        name, arguments, keywords = json.loads(line)
        answer(partial(call, scope, name, arguments, keywords))
    os._exit(0)


def call(scope: dict[str, Any], name: str, arguments: Any, keywords: Any) -> Any:
    return scope[name](*from_plain(arguments), **from_plain(keywords))


def send(pipe: BinaryIO, message: Any) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def to_plain(value: Any) -> Any:
    """Convert plain data to JSON values, with the built-in types' own methods: a subclass may override them.

    Raises TypeError for a value that is not plain data."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int.__add__(value, 0)
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [complex.real.__get__(value), complex.imag.__get__(value)]}
    if isinstance(value, bytes | bytearray):
        return {type_of(value, (bytes, bytearray)): list(memoryview(value))}
    if isinstance(value, dict):
        return {"dict": [[to_plain(key), to_plain(item)] for key, item in dict.items(value)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for kind, members in SEQUENCES.items():
        if isinstance(value, kind):
            return {kind.__name__: [to_plain(item) for item in members(value)]}
    if isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
        return {"iterator": [to_plain(item) for item in value]}
    raise TypeError(f"{type(value).__name__} is not plain data, which alone can be compared")


def type_of(value: Any, kinds: tuple[type, ...]) -> str:
    return next(kind.__name__ for kind in kinds if isinstance(value, kind))


def from_plain(value: Any) -> Any:
    """Invert `to_plain`; every result has a built-in type."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "dict":
        return {from_plain(key): from_plain(item) for key, item in content}
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind](content)
    if kind in ("complex", "range"):
        return {"complex": complex, "range": range}[kind](*content)
    makers: dict[str, Callable[[Any], Any]] = {"iterator": iter, **{each.__name__: each for each in SEQUENCES}}
    return makers[kind]([from_plain(item) for item in content])


if __name__ == "__main__":
    main()

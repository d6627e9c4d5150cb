"""Runs hostile programs in the sandbox: as root, as a user, and without namespaces."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostile_programs import HOSTILE
from sandboxes import SYSTEM_PYTHON, assert_nothing_left, refuse_unshare, results_as_a_user

from phi_fast.evaluation.sandbox import Limits, run_program

from .tally import Tally

LIMITS = Limits(wall_seconds=3.0, memory_mb=256)
SECONDS = 30.0
"""Time for one program and its sandbox, as a user."""


def attack(tally: Tally, seed: int) -> None:
    """With a target above the number of combinations, run each program in each way once."""
    choices = [(program, way) for way in ways() for program in HOSTILE]
    random.Random(seed).shuffle(choices)
    tally.counts.target = min(tally.counts.target, len(choices))
    with canaries() as port:
        while tally.more():
            program, way = choices[tally.counts.done]
            program = program.replace("{port}", str(port))
            try:
                way(program)
            except Exception as error:  # any error means that the program was not contained
                tally.raised(f"{way.__name__}: {program!r}", error)
            tally.did()
        try:
            assert_nothing_left()
        except AssertionError as error:
            tally.failed(str(error))


def ways() -> list:
    """The ways that this system allows; switching to another user needs root."""
    return [as_this_user, as_a_user, refused] if os.getuid() == 0 and SYSTEM_PYTHON.exists() else [as_this_user]


def as_this_user(program: str) -> None:
    contained(*vars(run_program(program, LIMITS)).values())


def as_a_user(program: str) -> None:
    with tempfile.TemporaryDirectory(prefix="phi-fast-attack-") as folder:
        results = results_as_a_user(Path(folder), [program], timeout=SECONDS)
    if not isinstance(results, str):  # this system allows users no namespaces: nothing ran
        contained(*results[0])


def contained(passed: bool, reason: str, output: str, *_: object) -> None:
    assert not passed, f"it passed: {output}"
    assert "supervisor" not in reason, reason


def refused(program: str) -> None:
    """Nothing may run without namespaces: the result is the reason, with the way out."""
    with tempfile.TemporaryDirectory(prefix="phi-fast-attack-") as folder:
        results = results_as_a_user(Path(folder), [program], before=refuse_unshare, timeout=SECONDS)
    assert isinstance(results, str) and "unshare" in results, f"it ran: {results}"


@contextmanager
def canaries() -> Iterator[int]:
    """Gives a server's port and a file; checks afterwards that nobody connected and that the file did not change."""
    with tempfile.NamedTemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as server:
        file.write(b"untouched")
        file.flush()
        Path(file.name).chmod(0o666)
        yield server.getsockname()[1]
        server.settimeout(0.1)
        assert Path(file.name).read_bytes() == b"untouched"
        try:
            server.accept()
        except TimeoutError:
            return
        raise AssertionError("a program reached a server on this machine")

"""Stages under a budget: each in a process of its own, so that a crash, a hang or a poisoned GPU ends one stage only.

The processes are forks: they share the parent's imports, and a GPU that none of them but their own has touched. The
parent must therefore never initialise CUDA.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.day import DONE, FAILED, NOT_MEASURED, RUNNING, STOPPED, Day

Put = Callable[[str, Any], None]
Clock = Callable[[], float]
_PARENT_DEATH_SIGNAL = 1  # prctl(2)'s PR_SET_PDEATHSIG


class NotMeasured(Exception):
    """A stage has nothing to measure here; the message says why."""


@dataclass(frozen=True)
class Session:
    """What a stage is given."""

    put: Put
    """Keeps a result at once: (key, JSON value)."""
    deadline: float
    """When the stage is stopped, on `clock`."""
    clock: Clock
    dry: bool
    """Toy sizes on a CPU: the script is tried, nothing is measured."""
    scratch: Path
    """A folder for files that nobody keeps."""

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.deadline - self.clock()


@dataclass(frozen=True)
class Stage:
    """One part of the day."""

    name: str
    title: str
    run: Callable[[Session], None]
    share: float
    """The most that it may take of the whole budget."""
    least: float = 5.0
    """Seconds without which it is not begun."""


class Outcome(NamedTuple):
    """How a stage ended: a state of `day`, and the reason."""

    state: str
    reason: str = ""


Execute = Callable[[Stage, Session], Outcome]


def run(
    stages: Sequence[Stage],
    day: Day,
    *,
    budget: float,
    began: float,
    scratch: Path,
    dry: bool = False,
    clock: Clock = time.monotonic,
    execute: Execute | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Run the stages in order until `budget` seconds after `began` (on `clock`); `day` has every result at once."""
    end, execute = began + budget, execute or in_a_process
    for stage in stages:
        start = clock()
        left = end - start
        if left < stage.least:
            why = f"{max(left, 0):.0f} s of the budget were left, and it is not begun with less than {stage.least:.0f}"
            day.set(stage.name, NOT_MEASURED, why)
            tell(f"[{start - began:4.0f} s] {stage.title}: {NOT_MEASURED}, {why}")
            continue
        tell(f"[{start - began:4.0f} s] {stage.title}")
        day.set(stage.name, RUNNING)

        def put(key: str, value: Any, name: str = stage.name) -> None:
            day.put(name, key, value)

        deadline = start + min(left, stage.share * budget)
        outcome = execute(stage, Session(put, deadline, clock, dry, scratch))
        seconds = clock() - start
        day.set(stage.name, outcome.state, outcome.reason, seconds)
        tell(
            f"[{clock() - began:4.0f} s] {stage.title}: {outcome.state} after {seconds:.0f} s {outcome.reason}".rstrip()
        )


def here(stage: Stage, session: Session) -> Outcome:
    """Run a stage in this process."""
    try:
        stage.run(session)
    except NotMeasured as nothing:
        return Outcome(NOT_MEASURED, str(nothing))
    except Exception as error:  # whatever it is, it is this stage's result, and the next stage runs
        traceback.print_exc()
        return Outcome(FAILED, f"{type(error).__name__}: {error}"[:2000])
    return Outcome(DONE)


def in_a_process(stage: Stage, session: Session) -> Outcome:
    """Run a stage in a fork of this process, which is killed with all that it started at the session's deadline."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(stage, session, sender, os.getpid()))
    sys.stdout.flush()
    process.start()
    sender.close()
    outcome: Outcome | None = None
    try:
        while outcome is None:
            if not receiver.poll(max(session.left(), 0)):
                outcome = Outcome(STOPPED, "its time was up: what it had measured is kept")
                break
            kind, *content = receiver.recv()
            if kind == "put":
                session.put(*content)
            else:
                outcome = Outcome(*content)
    except EOFError:
        process.join()
        outcome = Outcome(FAILED, _death(process.exitcode))
    finally:
        process.kill()
        _kill_group(process.pid)
        process.join()
        receiver.close()
    return outcome


def _child(stage: Stage, session: Session, sender: Connection, parent: int) -> None:
    """What the fork does: never returns."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def put(key: str, value: Any) -> None:
        sender.send(("put", key, value))

    outcome = here(stage, Session(put, session.deadline, session.clock, session.dry, session.scratch))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(("end", *outcome))
    sender.close()
    os._exit(0)  # the parent's exit handlers, and its GPU libraries', are not this process's to run


def _kill_group(pid: int | None) -> None:
    """End what the stage's process started; nothing is left of it where all have ended."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with status {code} and no result"

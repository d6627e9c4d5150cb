"""Run a program that a model wrote as if it were hostile: in its own processes, with limits on everything.

`isolation="namespaces"` (Linux) gives the program its own process table, network (none), users, mounts and IPC: it
sees a read-only Python and an empty temporary folder of bounded size, and nothing else. `isolation="limits"` is for
systems that refuse namespaces: resource limits, a process group and, on Linux, a system-call filter that denies sockets
and signals; there the program can still READ whatever the user can. It is never chosen silently.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launcher.py")
ISOLATIONS = ("namespaces", "limits")
LAUNCHER_GRACE_SECONDS = 20.0  # beyond the program's wall time: the launcher's own start on a loaded machine


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up: says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    """Elapsed time, whatever the program does with it."""
    cpu_seconds: int = 10
    """Processor time of each process."""
    memory_mb: int = 1024
    """Address space of each process, and resident memory of all of them together, MiB."""
    disk_mb: int = 32
    """The temporary folder and every file in it, MiB."""
    processes: int = 16
    """Processes and threads at one time."""
    output_kb: int = 64
    """Kept bytes of standard output and error together, KiB; more of it ends the program."""


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    passed: bool
    """The program ran to its last line, exited with 0, left no process behind and stayed within its limits."""
    reason: str
    """"passed", or why not, e.g. "timeout", "exit code 1", "signal SIGXCPU", "left 1 process behind"."""
    output: str
    """Standard output and error, cut to `Limits.output_kb`."""
    seconds: float
    """Elapsed time of the program."""


def run_program(source: str, limits: Limits | None = None, *, isolation: str = "namespaces") -> Result:
    """Run Python source text in a sandbox and wait for it.

    A program passes only if its last line was reached: `sys.exit(0)` or `os._exit(0)` before it is a failure. (This
    guards the machine, not the score: code that walks interpreter frames could still forge a pass.)

    Raises SandboxError where the sandbox cannot be built, with what the system refused, and ValueError for another
    isolation.
    """
    if isolation not in ISOLATIONS:
        raise ValueError(f"isolation={isolation!r} is not one of {', '.join(map(repr, ISOLATIONS))}")
    limits = limits or Limits()
    folder = tempfile.mkdtemp(prefix="phi-fast-sandbox-")
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))  # a virtual environment's is a link
    spec = {
        "source": source,
        "limits": asdict(limits),
        "isolation": isolation,
        "folder": folder,
        "python": python,
        "prefix": os.path.realpath(sys.base_prefix),
    }
    process = subprocess.Popen(
        [python, "-I", "-S", "-X", "utf8", str(LAUNCHER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={},
    )
    try:
        report, errors = process.communicate(json.dumps(spec).encode(), limits.wall_seconds + LAUNCHER_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return Result(False, "timeout (and its supervisor did not answer)", "", limits.wall_seconds)
    finally:
        _kill_session(process)
        shutil.rmtree(folder, ignore_errors=True)
    return _result(report, errors, process.returncode)


def run_programs(
    sources: list[str], limits: Limits | None = None, *, isolation: str = "namespaces", workers: int | None = None
) -> list[Result]:
    """`run_program` over a list, `workers` (default: half the processors) at a time; results in the list's order."""
    workers = workers or max(1, (os.cpu_count() or 2) // 2)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda source: run_program(source, limits, isolation=isolation), sources))


@functools.cache
def check_isolation(isolation: str) -> None:
    """Raise SandboxError, with the way out, where this system cannot build the sandbox. Tried once, on `pass`."""
    try:
        result = run_program("pass", isolation=isolation)
    except SandboxError as error:
        raise SandboxError(
            f"{error}. This system does not allow {isolation!r}: enable unprivileged user namespaces, run as root in a "
            "container with SYS_ADMIN, or accept isolation 'limits', under which a program can read the user's files"
        ) from error
    if not result.passed:
        raise SandboxError(f"`pass` does not pass under isolation {isolation!r}: {result.reason} {result.output}")


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its process group; a pid namespace dies with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _result(report: bytes, errors: bytes, returncode: int) -> Result:
    try:
        answer = json.loads(report)
    except ValueError:
        if returncode < 0:  # the program reached its supervisor: only possible under "limits" without a call filter
            return Result(False, f"the supervisor was ended by {signal.Signals(-returncode).name}", "", 0.0)
        raise SandboxError(
            f"the sandbox gave no report (exit code {returncode}): {errors.decode(errors='replace')}"
        ) from None
    if "error" in answer:
        raise SandboxError(answer["error"])
    return Result(**answer)

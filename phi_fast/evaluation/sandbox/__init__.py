"""Runs a program that a model wrote as if it were hostile: in its own processes, with limits on everything.

Linux namespaces give the program its own process table, users, mounts and IPC, and no network. It sees a read-only
Python and an empty temporary folder of limited size, and nothing else. On a system without namespaces no program runs.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cgroup

LAUNCHER = Path(__file__).with_name("launcher.py")
STANDING = b"the sandbox stands\n"
"""The launcher writes this line once the program runs: any later failure was caused by the program."""
LAUNCHER_GRACE_SECONDS = 20.0  # beyond the program's wall time: for the launcher's own start on a loaded machine


class SandboxError(RuntimeError):
    """The sandbox could not be set up, whatever the program."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program."""

    wall_seconds: float = 10.0
    """Elapsed time, whether or not the program uses the processor."""
    cpu_seconds: int = 10
    """Processor time of each process."""
    memory_mb: int = 1024
    """Address space of each process, and total memory of all processes, MiB. A control group counts the total, with the
    temporary folder and kernel buffers; without one, the resident memory of the processes is added up."""
    disk_mb: int = 32
    """Size of the temporary folder, and of every file in it, MiB."""
    processes: int = 16
    """Maximum number of processes and threads at a time."""
    output_kb: int = 64
    """Standard output and error together, KiB; a program that writes more is ended."""


@dataclass(frozen=True)
class Result:
    """Outcome of a program."""

    passed: bool
    """Whether the program ran to its last line, exited with 0, left no process behind and stayed within its limits."""
    reason: str
    """"passed", or why not, e.g. "timeout", "exit code 1", "signal SIGXCPU", "left 1 process behind"."""
    output: str
    """Standard output and error, cut to `Limits.output_kb`."""
    seconds: float
    """Elapsed time of the program."""


@dataclass(frozen=True)
class Judged:
    """A candidate, and tests that call its functions from another process and see their results as plain data only.

    Plain data are numbers, text, bytes, None, and lists, tuples, dicts, sets and iterators of them. Tests that need
    more, such as instances of the candidate's classes, must run as one program with the candidate.
    """

    source: str
    """The prompt and what the model wrote after it."""
    functions: tuple[str, ...]
    """Names of the functions that the tests call."""
    tests: str
    """Source that raises an exception if the candidate is wrong."""
    given: str = ""
    """Source that runs in the tests' process before them: imports, and helpers that the candidate must not change."""


Program = str | Judged


def run_program(program: Program, limits: Limits | None = None, *, control_group: bool = True) -> Result:
    """Run Python source text, or a candidate and its tests, in a sandbox and wait for it.

    A program passes only if its last line is reached: an earlier `sys.exit(0)` or `os._exit(0)` is a failure. Source
    text could forge this through the interpreter's frames, which it shares with the code that reports the last line; a
    `Judged` candidate cannot.

    control_group: False counts memory by thread even if a control group is available.

    Raises SandboxError, naming what the system refused, if the sandbox cannot be built.
    """
    limits = limits or Limits()
    content: dict[str, Any] = {"source": program} if isinstance(program, str) else asdict(program)
    size = len(json.dumps(content))
    if size > limits.disk_mb << 19:  # half of the temporary folder, to which the program is written
        return Result(False, f"a program of {size >> 10:,} KiB", "", 0.0)
    settings = cgroup.settings(limits.memory_mb, limits.processes) if control_group else None
    try:
        group = cgroup.Group(settings or {})
    except OSError as error:
        raise SandboxError(f"no control group could be made: {error}") from error
    try:
        return _run(content, limits, group.folders)
    finally:
        group.remove()


def _run(content: dict[str, Any], limits: Limits, groups: list[Path]) -> Result:
    folder = tempfile.mkdtemp(prefix="phi-fast-sandbox-")
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))  # a virtual environment's is a link
    spec = {
        "program": content,
        "limits": asdict(limits),
        "groups": [str(each) for each in groups],
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
        output, errors = process.communicate(json.dumps(spec).encode(), limits.wall_seconds + LAUNCHER_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return Result(False, "timeout (and its supervisor did not answer)", "", limits.wall_seconds)
    finally:
        _kill_session(process)
        shutil.rmtree(folder, ignore_errors=True)
    return _result(output, errors, process.returncode)


def run_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    control_group: bool = True,
    done: Callable[[int, Result], None] = lambda index, result: None,
) -> list[Result]:
    """Run a list of programs, `workers` (default: half the processors) at a time; results are in the list's order.

    done: called from the worker threads with the index and the result of each program as it ends.
    """
    workers = workers or max(1, (os.cpu_count() or 2) // 2)

    def run(index: int) -> Result:
        result = run_program(programs[index], limits, control_group=control_group)
        done(index, result)
        return result

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(len(programs))))


@functools.cache
def check() -> str:
    """Run `pass` in the sandbox once, and return a phrase that says how a program's memory is counted.

    Raises SandboxError, with the way out, if this system cannot build the sandbox.
    """
    try:
        result = run_program("pass")
    except SandboxError as error:
        raise SandboxError(
            f"{error}. Programs that a model wrote run in Linux namespaces only. Enable unprivileged user namespaces "
            "(sysctl kernel.unprivileged_userns_clone=1; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0), or "
            "run as root, in a container with --cap-add SYS_ADMIN --security-opt seccomp=unconfined"
        ) from error
    if not result.passed:
        raise SandboxError(f"`pass` does not pass in the sandbox: {result.reason} {result.output}")
    found = cgroup.places()
    if found is None:
        return "counted by thread (this user can make no control group for memory)"
    version, _, processes = found
    return (
        f"counted by a control group of version {version}{'' if processes or version == 2 else ', without processes'}"
    )


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and its process group; the kernel ends a pid namespace with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _result(output: bytes, errors: bytes, returncode: int) -> Result:
    try:
        answer = json.loads(output.removeprefix(STANDING))
    except ValueError:
        reason = errors.decode(errors="replace").strip()
        if output.startswith(STANDING):
            return Result(False, f"its supervisor was ended{': ' * bool(reason)}{reason}", "", 0.0)
        raise SandboxError(f"the sandbox gave no report (exit code {returncode}): {reason}") from None
    if "error" in answer and output.startswith(STANDING):
        return Result(False, f"its supervisor failed: {answer['error']}", "", 0.0)
    if "error" in answer:
        raise SandboxError(answer["error"])
    return Result(**answer)

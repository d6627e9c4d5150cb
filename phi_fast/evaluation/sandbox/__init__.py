"""Run a program that a model wrote as if it were hostile: in its own processes, with limits on everything.

The program gets its own process table, network (none), users, mounts and IPC (Linux namespaces): it sees a read-only
Python and an empty temporary folder of bounded size, and nothing else. Where a system refuses namespaces nothing runs.
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
"""The launcher's first line, once the program runs: what goes wrong after it is the program's doing."""
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
    """Address space of each process, and memory of all of them together, MiB: as a control group counts it, with the
    temporary folder and the kernel's buffers, where one can be had, else the resident memory of each process."""
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


@dataclass(frozen=True)
class Judged:
    """A candidate whose functions are called by tests in another process, which sees its results as plain data only.

    Tests that need more than numbers, text, bytes, None, and lists, tuples, dicts, sets and iterators of them, such as
    instances of the candidate's classes, cannot be written so: they run as one program with the candidate.
    """

    source: str
    """What the model wrote, with what it went on from."""
    functions: tuple[str, ...]
    """Names that the tests call."""
    tests: str
    """Source that raises where the candidate is wrong."""
    given: str = ""
    """Source that runs before the tests, beside them: imports, and helpers that are not the candidate's to change."""


Program = str | Judged


def run_program(program: Program, limits: Limits | None = None, *, control_group: bool = True) -> Result:
    """Run Python source text, or a candidate and its tests, in a sandbox and wait for it.

    A program passes only if its last line was reached: `sys.exit(0)` or `os._exit(0)` before it is a failure. Source
    text alone could forge that by walking interpreter frames, for it shares them with the code that proves it; a
    `Judged` candidate cannot.

    control_group: False counts memory by thread even where a control group can be had.

    Raises SandboxError where the sandbox cannot be built, with what the system refused.
    """
    limits = limits or Limits()
    content: dict[str, Any] = {"source": program} if isinstance(program, str) else asdict(program)
    size = len(json.dumps(content))
    if size > limits.disk_mb << 19:  # half of the folder that the program is written to
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
    """`run_program` over a list, `workers` (default: half the processors) at a time; results in the list's order.

    done: called from the working threads with each result as it comes, so that it can be kept.
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
    """Build the sandbox once, on `pass`, and return who counts the memory of a program in it, as a phrase.

    Raises SandboxError, with the way out, where this system cannot build the sandbox.
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
    """End the launcher and its process group; a pid namespace dies with its first process."""
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

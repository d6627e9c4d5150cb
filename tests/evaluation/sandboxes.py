"""Runs programs in the sandbox for its tests: as this user, as another user, and on a system without namespaces."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from phi_fast.evaluation import sandbox
from phi_fast.evaluation.sandbox import Limits, Program, Result, SandboxError, run_program, seccomp

SYSTEM_PYTHON = Path("/usr/bin/python3")


def refusal() -> str:
    """The reason why this system allows no sandbox; "" if it does."""
    try:
        sandbox.check()
    except SandboxError as error:
        return str(error)
    return ""


ALLOWED = pytest.mark.skipif("__import__('sandboxes').refusal()", reason="this system allows no sandbox")
ALWAYS_EQUAL = "class Yes:\n    def __eq__(self, other): return True\n"
AS_ROOT = pytest.mark.skipif(
    os.getuid() != 0 or not SYSTEM_PYTHON.exists(), reason="becomes another user, whom Python must let"
)


def run(source: Program, *, control_group: bool = True, **limits) -> Result:
    return run_program(source, Limits(**{"wall_seconds": 8.0, **limits}), control_group=control_group)


AS_A_USER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1])
sandbox = importlib.util.module_from_spec(spec)
sys.modules["sandbox"] = sandbox
spec.loader.exec_module(sandbox)
try:
    sandbox.check()
except sandbox.SandboxError as error:
    print(json.dumps(str(error)))
else:
    programs = [each if isinstance(each, str) else sandbox.Judged(**each) for each in json.load(sys.stdin)]
    results = sandbox.run_programs(programs, sandbox.Limits(wall_seconds=3.0))
    print(json.dumps([[result.passed, result.reason, result.output] for result in results]))
"""


def results_as_a_user(
    folder: Path, programs: Sequence[Program], before: Callable[[], None] | None = None, timeout: float = 120
) -> list[tuple[bool, str, str]] | str:
    """Run programs as another user, from a copy in `folder`: (passed, reason, output) of each, or why none ran.

    before: called in the process before it switches to the user.
    """
    shutil.copytree(Path(sandbox.__file__).parent, folder / "sandbox", dirs_exist_ok=True)
    for path in (*folder.parents[:3], folder, folder / "sandbox"):
        path.chmod(path.stat().st_mode | 0o755)
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", AS_A_USER, folder / "sandbox" / "__init__.py"],
        input=json.dumps([program if isinstance(program, str) else asdict(program) for program in programs]),
        capture_output=True,
        text=True,
        user=61183,
        group=61183,
        extra_groups=[],
        cwd="/",
        env={"TMPDIR": "/tmp"},
        preexec_fn=before,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refuse_unshare() -> None:
    """Install a system-call filter with which unshare(2) fails, as in a container without privileges."""
    number = seccomp.DENIED["unshare"][seccomp.ARCHITECTURES[platform.machine()][0]]
    instructions = (
        (seccomp.LOAD, 0, 0, seccomp.NUMBER_OFFSET),
        (seccomp.JUMP_EQUAL, 0, 1, number),
        (seccomp.RETURN, 0, 0, seccomp.RET_ERRNO | errno.EPERM),
        (seccomp.RETURN, 0, 0, seccomp.RET_ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(seccomp.PR_SET_SECCOMP, seccomp.SECCOMP_MODE_FILTER, program, 0, 0) == 0


def assert_nothing_left() -> None:
    """Assert that no process of a sandbox's user is alive. Other sandboxes that still run get a moment to end."""
    if os.getuid() != 0:
        return
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        owners = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                owners.append(folder.stat().st_uid)
            except OSError:
                continue
        if not any(sandbox_uid in range(61184, 61184 + 4336) for sandbox_uid in owners):
            return
        threading.Event().wait(0.1)
    raise AssertionError("a process of the sandbox is still alive")

"""Hostile programs: each is contained, and each is reported as failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostile_programs import NAMED
from sandboxes import ALLOWED, ALWAYS_EQUAL, assert_nothing_left, run

from phi_fast.evaluation import sandbox
from phi_fast.evaluation.generative import humaneval_program
from phi_fast.evaluation.sandbox import Judged, Result, SandboxError, run_program, run_programs

pytestmark = ALLOWED


def test_a_good_program_passes_with_an_empty_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    result = run("import os\nprint(sorted(os.environ))\nassert not os.environ.keys() - {'LC_CTYPE'}")
    assert result.passed, result
    assert result.output == "['LC_CTYPE']\n"
    assert run("import subprocess\nassert subprocess.run(['/bin/true']).returncode == 0").passed


@pytest.mark.parametrize(("source", "reason"), NAMED)
def test_what_went_wrong_is_named(source, reason):
    result = run(source, wall_seconds=1.5)
    assert (result.passed, result.reason) == (False, reason), result


def test_processor_time_is_limited():
    result = run("while True: pass", cpu_seconds=1, wall_seconds=30.0)
    assert result.reason in ("signal SIGXCPU", "signal SIGKILL"), result


def test_a_fork_bomb_reaches_its_limit_and_dies_whole():
    marker = f"bomb_{os.getpid()}"
    source = f"{marker} = 1\nimport os\nwhile True:\n    try:\n        os.fork()\n    except OSError: pass"
    start = time.monotonic()
    result = run(source, wall_seconds=1.0)
    assert not result.passed
    assert time.monotonic() - start < 10
    assert_nothing_left()
    counted = (
        "import os, time\nn = 0\n"
        "while True:\n    try:\n        pid = os.fork()\n    except OSError:\n        break\n"
        "    if pid == 0:\n        time.sleep(60)\n    n += 1\nprint(n, flush=True)\n"
    )
    result = run(counted, processes=8)
    assert not result.passed
    assert int(result.output) <= 8


def test_children_in_new_sessions_do_not_survive():
    source = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        try: os.setsid()
        except OSError: pass
        os.fork()
        time.sleep(61)
"""
    assert not run(source).passed
    assert_nothing_left()


def test_disk_floods():
    one_file = "with open('flood', 'wb') as f:\n    while True: f.write(bytes(1 << 20))"
    result = run(one_file, disk_mb=4)
    assert not result.passed
    assert "Errno" in result.output or result.reason == "signal SIGXFSZ", result
    many_files = "for i in range(100):\n    open(f'flood{i}', 'wb').write(bytes(1 << 20))"
    result = run(many_files, disk_mb=4)
    assert "No space left on device" in result.output
    result = run("for i in range(10**6):\n    open(f'flood{i}', 'wb').close()", disk_mb=4)
    assert "No space left on device" in result.output


def test_there_is_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        server.settimeout(0.2)
        assert not run(connect).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_signals_do_not_reach_the_parent():
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        for target in (os.getpid(), "os.getppid()"):
            assert not run(f"import os, signal\nos.kill({target}, signal.SIGUSR1)").passed
            swallowed = f"import os\ntry: os.kill({target}, 9)\nexcept OSError: pass\nassert 0"
            assert run(swallowed).reason == "exit code 1"
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert not received


def test_the_users_files_are_out_of_sight(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    secret.chmod(0o777)
    for source in (
        f"print(open({str(secret)!r}).read())",
        f"open({str(secret)!r}, 'w').write('gone')",
        f"print(open({str(Path(__file__))!r}).read())",
        "print(open('/etc/passwd').read())",
        "print(open('/proc/1/environ').read())",
        "import os; print(os.listdir('/home'))",
        "import os; open(os.__file__, 'a')",
        "open('/usr/planted', 'w')",
        "import os; os.mkdir('/planted')",
    ):
        result = run(source)
        assert not result.passed, (source, result)
        assert any(error in result.output for error in ("FileNotFound", "PermissionError", "Read-only")), result
    assert secret.read_text() == "hunter2"


def test_the_way_back_up_is_shut():
    if os.uname().machine != "x86_64":
        pytest.skip("system call numbers of x86-64")
    for call in (
        "272, 0x10000000",
        "165, b'none', b'/tmp', b'tmpfs', 0, 0",
        "56, 0x10000011, 0, 0, 0, 0",
        "101, 16, 1, 0, 0",
    ):
        result = run(f"import ctypes\nassert ctypes.CDLL(None).syscall({call}) >= 0, 'denied'")
        assert "denied" in result.output, (call, result)


def test_temporary_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    assert run("open('left', 'w').write('x')").passed
    assert not list(tmp_path.iterdir())


def test_many_at_once_keep_their_order():
    results = run_programs([f"assert {i} % 3" for i in range(12)], workers=4)
    assert [result.passed for result in results] == [bool(i % 3) for i in range(12)]


def test_a_sandbox_that_cannot_be_built_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "_base_executable", "/bin/false")
    with pytest.raises(SandboxError, match="no report"):
        run_program("")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = '\ud800'", "exit code 1"),
        ("#" + "x" * (40 << 20), "a program of 40,960 KiB"),
        ("\0", "exit code 1"),
        ("(" * 1000, "exit code 1"),
    ],
    ids=["lone surrogate", "40 MB", "null byte", "too deep"],
)
def test_what_is_no_program_fails_alone(source, reason):
    results = run_programs(["assert 1", source, "assert 1"])
    assert [result.passed for result in results] == [True, False, True]
    assert results[1].reason == reason


def test_a_supervisor_that_dies_is_the_failure_of_its_program_alone(monkeypatch):
    """The supervisor is killed from outside the sandbox: no program inside can do it."""

    class Killed(subprocess.Popen):
        def communicate(self, text: bytes, timeout: float) -> tuple[bytes, bytes]:
            if b"time.sleep(60)" in text:
                threading.Thread(target=self.kill_supervisor).start()
            return super().communicate(text, timeout)

        def kill_supervisor(self) -> None:
            """Kill the supervisor once the program itself runs, which its command line shows."""
            supervisor = -1
            while not any(b"-c" in command for _, command in children(supervisor)):
                time.sleep(0.05)
                supervisor = next((pid for pid, _ in children(self.pid)), -1)
            time.sleep(0.5)
            os.kill(supervisor, signal.SIGKILL)

    monkeypatch.setattr(subprocess, "Popen", Killed)
    results = run_programs(["assert 1", "import time\ntime.sleep(60)", "assert 1"], workers=1)
    assert [result.passed for result in results] == [True, False, True]
    assert results[1].reason == "its supervisor was ended"


def children(parent: int) -> list[tuple[int, list[bytes]]]:
    """(pid, command line) of each process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append((int(folder.name), (folder / "cmdline").read_bytes().split(b"\0")))
        except OSError:  # ended since the listing
            continue
    return found


def test_results_are_told_as_they_come():
    told = {}
    results = run_programs(["pass", "assert 0"], workers=1, done=told.__setitem__)
    assert told == dict(enumerate(results))


DOUBLE = "assert double(2) == 4\nassert double([1]) == [1, 1]\n"


def judged(source: str, tests: str = DOUBLE, given: str = "") -> Result:
    return run(Judged(source, ("double",), tests, given))


def test_a_candidate_is_judged_on_plain_data():
    right = "def double(x): return x + x\n"
    assert run(ALWAYS_EQUAL + "def double(x): return Yes()\n" + DOUBLE).passed  # a single process cannot detect this
    for cheat in (
        ALWAYS_EQUAL + "def double(x): return Yes()\n",
        ALWAYS_EQUAL + "class Int(int, Yes): pass\ndef double(x): return Int(3)\n".replace("(int, Yes)", "(Yes, int)"),
        "class Liar(list):\n    __eq__ = lambda self, other: True\ndef double(x): return Liar()\n",
        "import os\ndef double(x): os._exit(0)\n",
        "import builtins\nbuiltins.AssertionError = Exception\ndef double(x): return 0\n",
        "import sys\nsys.exit(0)\n",
        "import gc, os\n[os.write(fd, b'x' * 32) for fd in range(3, 10) if not os.fstat(fd)]\n",
        "def other(x): return x + x\n",
        "import time\ndef double(x): time.sleep(60)\n",
    ):
        result = judged(cheat)
        assert not result.passed, (cheat, result)
    assert judged(right).passed
    assert judged(right + "import threading, time\nthreading.Thread(target=time.sleep, args=(0.1,)).start()\n").passed


@pytest.mark.parametrize(
    "value",
    [
        *("None", "True", "-0.0", "float('inf')", "10 ** 5000", "2 ** 0.5", "1j", "'\\u2028\\ud800'", "b'\\x00'"),
        *("bytearray(b'a')", "()", "(1, [2], {3: (4,)})", "{1, 2}", "frozenset('ab')", "{(1, 2): {'a'}}"),
        "range(1, 9, 2)",
    ],
)
def test_plain_data_arrives_as_it_was(value):
    tests = f"x = {value}\ny = double(x)\nassert type(y) is type(x) and y == x and repr(y) == repr(x), y\n"
    assert judged("def double(x): return x\n", tests).passed


@pytest.mark.parametrize(
    ("body", "expression"),
    [
        ("import collections; return collections.Counter(x)", "double('aab') == {'a': 2, 'b': 1}"),
        ("return (y for y in x)", "list(double([1, 2])) == [1, 2]"),
        ("return (y for y in x)", "double([1, 2]) != [1, 2]"),
        ("return {1: 2}.keys()", "list(double(0)) == [1]"),
        ("import enum; return enum.IntEnum('E', 'a')(1)", "double(0) == 1"),
    ],
)
def test_what_resembles_plain_data_is_read_as_it(body, expression):
    assert judged(f"def double(x): {body}\n", f"assert {expression}\n").passed


def test_errors_of_a_candidate_reach_its_tests():
    tests = "try: double(1)\nexcept ValueError as error: assert str(error) == 'no'\nelse: assert 0\n"
    assert judged("def double(x): raise ValueError('no')\n", tests).passed
    result = judged("class Own(Exception): pass\ndef double(x): raise Own('no')\n", "double(1)")
    assert "CandidateError: Own: no" in result.output


def test_what_is_given_to_the_tests_is_not_the_candidates_to_change():
    given = "def near(a, b): return abs(a - b) < 1e-6\n"
    cheat = "def near(a, b): return True\ndef double(x): return 0\n"
    assert not judged(given + cheat, "assert near(double(2), 4)", given).passed
    assert judged(given + "def double(x): return 2 * x\n", "assert near(double(2), 4)", given).passed


@pytest.mark.slow
@pytest.mark.skipif(
    "PHI_FAST_EVAL_DATA" not in os.environ, reason="PHI_FAST_EVAL_DATA names no folder with human_eval.jsonl"
)
def test_human_eval_canonical_solutions_pass_and_broken_ones_fail():
    lines = (Path(os.environ["PHI_FAST_EVAL_DATA"]) / "human_eval.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    assert len(problems) == 164
    good = run_programs([humaneval_program(p, p["canonical_solution"]) for p in problems])
    assert [p["task_id"] for p, r in zip(problems, good, strict=True) if not r.passed] == []
    always_equal = f"    {ALWAYS_EQUAL.strip()}\n    return Yes()\n".replace("\n    def", "\n        def")
    for wrong in ("    return object()\n", always_equal):
        broken = run_programs([humaneval_program(p, wrong) for p in problems])
        assert [p["task_id"] for p, r in zip(problems, broken, strict=True) if r.passed] == []

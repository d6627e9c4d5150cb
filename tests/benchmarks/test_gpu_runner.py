"""The budget of a GPU's day, with a clock that the tests turn, and the processes of its stages, with a real one."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.day import Day, unused
from benchmarks.gpu.page import page
from benchmarks.gpu.runner import NotMeasured, Session, Stage

HEAD = {"machine": {"device": "NVIDIA X", "versions": {"torch": "2.11"}, "gpu": None}, "commit": "abc", "dry": False}
HEAD |= {"budget_s": 600.0, "predicted": None}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taking(clock: Clock, seconds: float, calls: list[str] | None = None, name: str = "") -> Callable[[Session], None]:
    def go(session: Session) -> None:
        if calls is not None:
            calls.append(name)
        session.put("left", session.left())
        clock.now += seconds

    return go


def run(
    tmp_path: Path, stages: list[Stage], clock: Callable[[], float], budget: float, **options: Any
) -> dict[str, Any]:
    day = Day(tmp_path / "day.json", HEAD, [(stage.name, stage.title) for stage in stages])
    options = {"execute": runner.here, "tell": lambda line: None, "began": clock()} | options
    runner.run(stages, day, budget=budget, scratch=tmp_path, clock=clock, **options)
    return json.loads(day.path.read_text())["stages"]


def test_a_stage_is_given_its_share_of_the_budget_and_no_more_than_is_left(tmp_path: Path) -> None:
    clock = Clock()
    stages = [Stage("a", "A", taking(clock, 40), 0.5), Stage("b", "B", taking(clock, 10), 0.9)]
    found = run(tmp_path, stages, clock, 100)
    assert found["a"]["results"] == {"left": 50}
    assert found["b"]["results"] == {"left": 60}
    assert [found[name]["seconds"] for name in "ab"] == [40, 10]


def test_what_the_budget_does_not_reach_is_not_measured(tmp_path: Path) -> None:
    """In order of importance: the one that is too long for what is left is passed over, a shorter one still runs."""
    clock, calls = Clock(), []
    stages = [
        Stage("a", "A", taking(clock, 90, calls, "a"), 1.0),
        Stage("b", "B", taking(clock, 1, calls, "b"), 1.0, least=20),
        Stage("c", "C", taking(clock, 9, calls, "c"), 1.0, least=5),
        Stage("d", "D", taking(clock, 1, calls, "d"), 1.0, least=5),
    ]
    found = run(tmp_path, stages, clock, 100)
    assert calls == ["a", "c"]
    assert [found[name]["state"] for name in "abcd"] == ["done", "not measured", "done", "not measured"]
    assert found["b"]["reason"] == "10 s of the budget were left, and it is not begun with less than 20"
    assert found["d"]["results"] == {}


def test_time_that_went_by_before_the_first_stage_counts(tmp_path: Path) -> None:
    clock = Clock()
    found = run(tmp_path, [Stage("a", "A", taking(clock, 1), 1.0)], clock, 100, began=clock.now - 60)
    assert found["a"]["results"] == {"left": 40}


def failing(session: Session) -> None:
    session.put("before", 1)
    raise ValueError("no such kernel")


@pytest.mark.parametrize("execute", [runner.here, runner.in_a_process])
def test_a_stage_that_fails_keeps_what_it_had_and_the_next_one_runs(tmp_path: Path, execute: runner.Execute) -> None:
    stages = [Stage("a", "A", failing, 1.0), Stage("b", "B", lambda session: session.put("x", 2), 1.0)]
    found = run(tmp_path, stages, time.monotonic, 60, execute=execute)
    assert found["a"]["state"] == "failed"
    assert found["a"]["reason"] == "ValueError: no such kernel"
    assert found["a"]["results"] == {"before": 1}
    assert found["b"]["results"] == {"x": 2}


def test_nothing_to_measure_is_no_failure(tmp_path: Path) -> None:
    def absent(session: Session) -> None:
        raise NotMeasured("there is no such tool here")

    found = run(tmp_path, [Stage("a", "A", absent, 1.0)], time.monotonic, 60, execute=runner.in_a_process)
    assert (found["a"]["state"], found["a"]["reason"]) == ("not measured", "there is no such tool here")


def crashing(session: Session) -> None:
    faulthandler.disable()  # pytest's would write the stack of this fork among the test's output
    session.put("before", 1)
    ctypes.string_at(0)


def hanging(session: Session) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    session.put("child", sleeper.pid)
    time.sleep(600)


def test_a_crash_and_a_hang_end_one_stage_only(tmp_path: Path) -> None:
    stages = [
        Stage("crash", "A", crashing, 1.0),
        Stage("hang", "B", hanging, 0.02, least=0.1),
        Stage("next", "C", lambda session: session.put("x", 2), 1.0),
    ]
    found = run(tmp_path, stages, time.monotonic, 100, execute=runner.in_a_process)
    assert (found["crash"]["state"], found["crash"]["results"]) == ("failed", {"before": 1})
    assert found["crash"]["reason"] == "its process was ended by SIGSEGV"
    assert found["hang"]["state"] == "stopped"
    assert found["next"]["results"] == {"x": 2}
    assert ended(found["hang"]["results"]["child"])


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody waits for."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


KILLED = """
import sys, time
from pathlib import Path
from benchmarks.gpu import runner
from benchmarks.gpu.day import Day
from benchmarks.gpu.runner import Stage
from test_gpu_runner import HEAD

def endless(session):
    for number in range(10**6):
        session.put(f"result {number}", number)

stages = [
    Stage("a", "A", lambda session: session.put("x", 1), 1.0),
    Stage("b", "B", endless, 1.0),
    Stage("c", "C", endless, 1.0),
]
day = Day(Path(sys.argv[1]), HEAD, [(stage.name, stage.title) for stage in stages])
runner.run(stages, day, budget=600, began=time.monotonic(), scratch=Path("."))
"""


def test_a_kill_leaves_a_readable_file_with_all_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results" / "day.json"
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (path.exists() and len(json.loads(path.read_text())["stages"]["b"]["results"]) > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    document = json.loads(path.read_text())
    stages = document["stages"]
    assert (stages["a"]["state"], stages["a"]["results"]) == ("done", {"x": 1})
    assert stages["b"]["state"] == "running"
    count = len(stages["b"]["results"])
    assert stages["b"]["results"] == {f"result {number}": number for number in range(count)}
    assert stages["c"] == {
        "title": "C",
        "state": "not measured",
        "reason": "not reached",
        "seconds": None,
        "results": {},
    }
    written = page(document)
    assert "cut short with the whole run: what it had measured is kept" in written
    assert "Not measured: not reached" in written


def test_an_earlier_run_of_the_day_is_never_written_over(tmp_path: Path) -> None:
    first = unused(tmp_path, "nvidia-x-2026-11-28")
    first.write_text("{}")
    second = unused(tmp_path, "nvidia-x-2026-11-28")
    assert (first.name, second.name) == ("nvidia-x-2026-11-28.json", "nvidia-x-2026-11-28-2.json")

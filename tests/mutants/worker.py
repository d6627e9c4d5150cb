"""Runs pytest again and again in children of one process that has imported torch, Triton and pytest.

Reads a JSON object per line, {"arguments": [...], "order": [...], "cpu_seconds": n}, and answers with one: {"status",
"seconds", "failed", "durations"}. The kernels under test are imported by the child alone, from files as they are then.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = ("-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider")
"""Which test fails is of interest, and not much of how: rewriting the asserts takes longer than many tests."""


class Watch:
    """A pytest plugin that runs the tests in the order asked for, and writes down how long each took and which failed
    first."""

    def __init__(self, note: Path, order: list[str]) -> None:
        self._note, self._rank = note, {test: rank for rank, test in enumerate(order)}
        self._seen: dict[str, Any] = {"failed": "", "durations": {}}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._rank.get(item.nodeid, len(self._rank)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        durations = self._seen["durations"]
        durations[report.nodeid] = durations.get(report.nodeid, 0.0) + report.duration
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed and not self._seen["failed"]:
            self._seen["failed"] = report.nodeid
            self._write()  # pytest may die before the end

    def pytest_sessionfinish(self) -> None:
        self._write()

    def _write(self) -> None:
        self._note.write_text(json.dumps(self._seen))


def run(arguments: list[str], order: list[str], cpu_seconds: int) -> dict[str, object]:
    """One pytest in a child. `status` is its exit status, or minus the signal that ended it."""
    note = Path("note")
    note.write_text(json.dumps({"failed": "", "durations": {}}))
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 10))  # SIGXCPU, then SIGKILL
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(pytest.main([*arguments, *QUICK], plugins=[Watch(note, order)]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime
    return {"status": status, "seconds": seconds, **json.loads(note.read_text())}


def main() -> None:
    import hypothesis  # noqa: F401
    import torch._dynamo
    import torch.testing
    import triton.language  # noqa: F401

    import phi_fast.data.stdlib_corpus
    import phi_fast.kernels  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.startswith("phi_fast.kernels.triton") for name in sys.modules), "children import these"
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

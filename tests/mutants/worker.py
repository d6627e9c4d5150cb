"""Runs pytest again and again in children of one process that has imported torch, Triton and pytest.

Reads a JSON object per line, {"arguments": [...], "cpu_seconds": n}, and answers with one: {"status", "seconds",
"failed"}. The kernels under test are imported by the child alone, from files as they are then.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest

QUICK = ("-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider")
"""Which test fails is of interest, and not much of how: rewriting the asserts takes longer than many tests."""


class FirstFailure:
    """A pytest plugin that writes down which test failed first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)


def run(arguments: list[str], cpu_seconds: int) -> dict[str, object]:
    """One pytest in a child. `status` is its exit status, or minus the signal that ended it."""
    note = Path("failed")
    note.unlink(missing_ok=True)
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 10))  # SIGXCPU, then SIGKILL
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(pytest.main([*arguments, *QUICK], plugins=[FirstFailure(note)]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime
    return {"status": status, "seconds": seconds, "failed": note.read_text() if note.exists() else ""}


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

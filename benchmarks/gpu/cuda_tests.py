"""Stage "tests": every test that means something on CUDA, in parallel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Session
from phi_fast.json_files import read_lines

ROOT = Path(__file__).parents[2]
TESTS = ("tests/kernels", "tests/model", "tests/test_verify.py", "tests/training/test_fp16_parity.py")
"""Tests whose tensors are on the GPU where there is one; the others run on CPUs, where `make test` runs them."""
DRY = ("tests/model/test_reference.py",)
WORKERS = 8
"""Processes at most: each holds a CUDA context of about half a gigabyte."""


class TestsFailed(Exception):
    """Some tests failed."""


def run(session: Session) -> None:
    """Counts as they become known, and each failure's end. Raises TestsFailed."""
    outcomes = session.scratch / "outcomes.jsonl"
    outcomes.touch()
    workers = min(WORKERS, os.cpu_count() or 1) if not session.dry else 0
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]  # or one file that needs an absent package would stop them all
    command += ["-m", "not slow", *(["-n", str(workers), "--dist", "worksteal"] if workers else [])]
    command += DRY if session.dry else TESTS
    # Not the variables of a pytest that runs this: its workers leave the outcomes to their controller.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PHI_FAST_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
    log = session.scratch / "tests.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and session.left() > 3:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(2.0, session.left() - 3))
            report(session, outcomes)
        ended = process.poll() is not None
        process.kill()
        status = process.wait()
    counts = report(session, outcomes)
    session.put("all ended", ended)
    if status and ended and not counts["failed"]:
        last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise TestsFailed(f"pytest ended with status {status}: {last}")
    if counts["failed"]:
        raise TestsFailed(f"{counts['failed']} tests failed")


def report(session: Session, outcomes: Path) -> Counter[str]:
    """Put what is known so far."""
    lines = [line for _, line in read_lines(outcomes)]
    counts = Counter(line["outcome"] for line in lines)
    session.put("counts", {name: counts[name] for name in ("passed", "failed", "skipped")})
    failures: list[dict[str, Any]] = [line for line in lines if line["outcome"] == "failed"]
    session.put("failures", [{"test": f["test"], "error": f["error"][-600:]} for f in failures] or "none")
    return counts

"""A pytest plugin: every test's outcome as a line of JSON in the file that PHI_FAST_OUTCOMES names, as soon as it is
known. A run that is stopped has told what it found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Once per test: its call, or a set-up that skipped or failed. Under xdist only the controller is told."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome == "failed":
        line["error"] = str(report.longrepr)[-1500:]
    with Path(os.environ["PHI_FAST_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

"""A pytest plugin: every test's outcome as a line of JSON in the file that PHI_FAST_OUTCOMES names, as soon as it is
known. A run that is stopped has told what it found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Once per test: its call, or a set-up that skipped or failed."""
    if report.when == "call" or report.outcome != "passed":
        keep(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure too; the other files' tests run."""
    if report.failed:
        keep(report)


def keep(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Under xdist the controller is told of everything, and it alone writes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    line: dict[str, Any] = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(getattr(report, "duration", 0.0), 2),
    }
    if report.outcome == "failed":
        line["error"] = str(report.longrepr)[-1500:]
    with Path(os.environ["PHI_FAST_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

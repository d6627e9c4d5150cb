"""`--benchmark`: measure in full and keep the results. Without it each benchmark runs once, small, as a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.harness import RESULTS, Results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="measure in full; write DEVICE-DATE.json")
    parser.addoption("--results", type=Path, default=RESULTS, help="the folder that --benchmark writes to")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True where figures are wanted, False for the small run that only shows that the benchmark works."""
    return bool(request.config.getoption("--benchmark"))


@pytest.fixture(scope="session")
def results(full: bool, request: pytest.FixtureRequest) -> Iterator[Results]:
    """Where a benchmark puts its subjects: printed at once, and in a full run written at once."""
    collected = Results(request.config.getoption("--results") if full else None)
    yield collected
    if collected.path:
        print(f"\nwrote {collected.path}; python -m benchmarks.report makes the tables and plots")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def kept_memory() -> Iterator[None]:
    """For single kernels: page faults of large outputs do not hide them (`timing.kept_memory`)."""
    with timing.kept_memory():
        yield

"""`--benchmark`: measure in full and keep the results. Without it each benchmark runs once, small, as a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="measure in full; write benchmarks/results/DEVICE-DATE.json"
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True where figures are wanted, False for the small run that only shows that the benchmark works."""
    return bool(request.config.getoption("--benchmark"))


@pytest.fixture(scope="session")
def results(full: bool) -> Iterator[Results]:
    """Where a benchmark puts its rows; printed at the end of each, and kept on disk after a full run."""
    collected = Results()
    yield collected
    if full and collected.subjects:
        print(f"\nwrote {collected.write()}")

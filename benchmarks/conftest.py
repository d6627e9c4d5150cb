"""`--benchmark` measures in full, keeps the results, and prints them as tables at the end.

Without it each benchmark runs once on a small size, as a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import tables, timing
from benchmarks.harness import RESULTS, Results
from phi_fast.terminal import console as open_console

COLLECTED = pytest.StashKey[Results]()
DESELECTED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="measure in full; write DEVICE-DATE.json")
    parser.addoption("--results", type=Path, default=RESULTS, help="the folder that --benchmark writes to")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True for a full measurement, False for the small run that only shows that the benchmark works."""
    return bool(request.config.getoption("--benchmark"))


@pytest.fixture(scope="session")
def results(full: bool, request: pytest.FixtureRequest) -> Results:
    """Collects the subjects of all benchmarks; a full run writes each at once and prints all at the end."""
    request.config.stash[COLLECTED] = Results(request.config.getoption("--results") if full else None)
    return request.config.stash[COLLECTED]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark rows in bf16 as slow where nothing is measured: that a benchmark works is seen in fp32."""
    if config.getoption("--benchmark"):
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and "bf16" in item.name:
            item.add_marker(pytest.mark.slow)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that -k, -m, --deselect or --last-failed left something out."""
    for item in items[:1]:
        item.config.stash[DESELECTED] = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Mark the results as whole if every benchmark was run and none failed."""
    results = session.config.stash.get(COLLECTED, None)
    files = {item.path for item in session.items}
    some = session.config.stash.get(DESELECTED, False) or any("::" in word for word in session.config.args)
    if results and exitstatus == 0 and not some and files >= set(Path(__file__).parent.glob("test_*.py")):
        results.finish()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables of a full run, and the file that keeps them."""
    results = config.stash.get(COLLECTED, None)
    if results is None or results.directory is None:
        return
    terminalreporter.section("benchmarks")
    console = open_console(file=terminalreporter._tw._file, width=160)
    for subject in results.subjects:
        tables.show(subject, console)
    terminalreporter.write_line(f"wrote {results.path}; python -m benchmarks.report makes the tables and plots")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Use the same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def kept_memory() -> Iterator[None]:
    """Keep freed memory (`timing.kept_memory`), so that page faults of large outputs do not hide a kernel's time."""
    with timing.kept_memory():
        yield

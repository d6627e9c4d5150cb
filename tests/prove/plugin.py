"""pytest's plugin of `make prove`: launches of Triton go to `semantics.session`, and a table by kernel ends the run.

The run fails where a test fails, where a launch was stopped even if its test caught that, and where a kernel of
`kernels/triton` was not launched at all. A launch too large for ttsem's check for races is run, and then named as not
checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from phi_fast.kernels.triton import attention, attention_tiles
from phi_fast.kernels.triton.specimens import specimens
from prove.semantics import Tally, kernel_name, session

ATTENTION = "test_attention"
"""The module whose tests run once for the tiles of each architecture."""

_tallies: dict[str, Tally] = {}
_open = contextlib.ExitStack()
_running = ""


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "0":
        raise pytest.UsageError("set TRITON_INTERPRET=0 before Python starts: ttsem executes what Triton compiled")
    controls = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not controls:  # pytest-xdist's controller runs no test
        _open.enter_context(session(_tallies, lambda: _running))


def pytest_unconfigure() -> None:
    _open.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ == ATTENTION:
        metafunc.fixturenames.append("tiles_of")
        metafunc.parametrize("tiles_of", attention_tiles.ARCHITECTURES, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what would be run twice: the tiles of fp32 are one for all architectures."""
    first = attention_tiles.ARCHITECTURES[0]
    twice = [item for item in items if _parameter(item, "tiles_of", first) != first]
    twice = [item for item in twice if _parameter(item, "dtype", None) == torch.float32]
    config.hook.pytest_deselected(items=twice)
    left_out = set(twice)
    items[:] = [item for item in items if item not in left_out]


def _parameter(item: pytest.Item, name: str, default: Any) -> Any:
    return item.callspec.params.get(name, default) if hasattr(item, "callspec") else default


@pytest.fixture
def tiles_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in the tiles of one architecture; on CPU tensors it would always take those of sm_80."""
    monkeypatch.setattr(attention, "architecture", lambda _device: request.param)


def pytest_runtest_logstart(nodeid: str) -> None:
    global _running
    _running = nodeid


@pytest.hookimpl(trylast=True)  # pytest-xdist's controller waits for its workers in this hook
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["prove"] = json.dumps({name: vars(tally) for name, tally in _tallies.items()})
    elif _unlaunched() or any(tally.faults for tally in _tallies.values()):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, counts in json.loads(node.workeroutput["prove"]).items():
        _tallies.setdefault(name, Tally()).add(**counts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    table = Table(title="Kernels as Triton compiled them", box=box.ASCII2)
    for heading in ("kernel", "launches", "checked for races", "of one program", "not checked", "faults"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for name, tally in sorted(_tallies.items()):
        unchecked, faults = tally.unchecked.total(), tally.faults.total()
        checked = tally.launches - tally.alone - unchecked - faults
        table.add_row(name, *map(str, (tally.launches, checked, tally.alone, unchecked, faults)))
    console = Console(width=120)
    with console.capture() as printed:
        console.print(table)
    write(printed.get())
    for name, tally in sorted(_tallies.items()):
        for test, launches in tally.unchecked.items():
            write(f"{name}: {launches} launches of {test} are too large to be checked for races")
        for message in tally.faults:
            write(f"{name}: {message}")
    for name in _unlaunched():
        write(f"{name}: never launched")


def _unlaunched() -> list[str]:
    """Kernels of the specimens, which are all that a model launches, that no test launched."""
    launches = [specimen.launch for specimen in specimens("sm_90", torch.float16)]
    return sorted({kernel_name(launch.kernel) for launch in launches} - set(_tallies))

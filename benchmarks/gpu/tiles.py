"""Stage "tiles": tiles and attention's back ends swept by `phi_fast.kernels.tune`, where this version has it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.gpu.runner import NotMeasured, Session
from phi_fast.json_files import read_json
from phi_fast.kernels import tuned

MODULE = "phi_fast.kernels.tune"
TABLE = "tiles.json"
"""The table's name in the session's scratch folder, where the stages after this one find it."""
POLL = 2.0
"""Seconds between two looks at the table, which grows with each kernel."""


class SweepFailed(Exception):
    """The sweep ended with an error."""


def sweep(session: Session) -> None:
    """`python -m phi_fast.kernels.tune --seconds N --json FILE`; the table is put whole whenever it has grown.

    A dry run only lists what would be timed. Raises NotMeasured where the module is not there, SweepFailed where it
    fails.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise NotMeasured(f"this version has no {MODULE}")
    table = session.scratch / TABLE
    command = [sys.executable, "-m", MODULE, "--seconds", f"{session.left() - 10:.0f}", "--json", str(table)]
    if session.dry:
        command += ["--list", "--ops", "layer_norm", "--most", "2"]
    log = session.scratch / "tiles.log"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        seen = None
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            seen = _put(session, table, seen)
    if process.returncode:
        said = log.read_text(encoding="utf-8")[-1000:]
        raise SweepFailed(f"{MODULE} ended with status {process.returncode}: {said}")
    if session.dry:
        session.put("list", log.read_text(encoding="utf-8").splitlines())


def _put(session: Session, table: Path, seen: int | None) -> int | None:
    """Put the table if it was written since `seen`, its time of modification."""
    if not table.exists() or table.stat().st_mtime_ns == seen:
        return seen
    written = table.stat().st_mtime_ns
    session.put("table", read_json(table))
    return written


@contextmanager
def in_use(table: Path) -> Iterator[None]:
    """Let kernels launched inside take their tiles from `table`."""
    from phi_fast.kernels.triton import tiles

    before = os.environ.get(tuned.VARIABLE)
    os.environ[tuned.VARIABLE] = str(table)
    tiles.forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ[tuned.VARIABLE]
        else:
            os.environ[tuned.VARIABLE] = before
        tiles.forget()

"""Stage "tiles": tiles, warps and variants swept by `phi_fast.kernels.tune`, where this version has it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from benchmarks.gpu.runner import NotMeasured, Session
from phi_fast.json_files import read_json

MODULE = "phi_fast.kernels.tune"


class SweepFailed(Exception):
    """The sweep ended with an error."""


def sweep(session: Session) -> None:
    """`python -m phi_fast.kernels.tune --seconds N --json FILE`; what it wrote is put whole.

    Raises NotMeasured where the module is not there, SweepFailed where it fails.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise NotMeasured(f"this version has no {MODULE}")
    table = session.scratch / "tiles.json"
    command = [sys.executable, "-m", MODULE, "--seconds", f"{session.left() - 10:.0f}", "--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SweepFailed(f"{MODULE} ended with status {done.returncode}: {done.stderr[-1000:]}")
    session.put("table", read_json(table))

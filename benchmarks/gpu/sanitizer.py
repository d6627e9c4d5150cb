"""Stage "sanitizer": compute-sanitizer's memcheck and racecheck over one small launch of every kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import NotMeasured, Session

TOOLS = ("memcheck", "racecheck")
FOUND = 86
"""Exit status that compute-sanitizer is told to end with where it found something."""


class Faults(Exception):
    """compute-sanitizer found an access or a race."""


def check(session: Session) -> None:
    """Both tools at once. Raises Faults with what they found; NotMeasured where there is no compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None and not session.dry:
        raise NotMeasured("compute-sanitizer is not on the PATH, nor in /usr/local/cuda/bin")
    running = {tool: start(tool, sanitizer, session) for tool in (TOOLS if sanitizer else ("no tool",))}
    rows: list[dict[str, Any]] = []
    for tool, (process, log) in running.items():
        try:
            status: int | None = process.wait(timeout=max(session.left() - 2, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        rows.append({"tool": tool} | outcome(log.read_text(errors="replace"), status))
        session.put("launches", rows)
    if bad := [row for row in rows if row["faults"]]:
        raise Faults("; ".join(f"{row['tool']}: {row['faults']}" for row in bad))


def start(tool: str, sanitizer: str | None, session: Session) -> tuple[subprocess.Popen[bytes], Path]:
    """Run the launches under a tool; without a sanitizer, in a dry run, they run on the CPU alone."""
    log = session.scratch / f"{tool}.log"
    launches = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.small_launches"]
    launches += ["--cpu"] if session.dry else []
    watched = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)] if sanitizer and not session.dry else []
    # Every tensor is its own allocation: memcheck sees an access past a tensor's end, not past a pool's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("wb") as file:
        return subprocess.Popen([*watched, *launches], stdout=file, stderr=subprocess.STDOUT, env=environment), log


def outcome(log: str, status: int | None) -> dict[str, Any]:
    """Launches that ended, and what was found, from the output of a tool. status: None where its time was up."""
    ended = re.findall(r"^ok (.*)$", log, re.MULTILINE)
    faults = re.findall(r"^========= ((?:Invalid|Error: |Race|Program hit|Misaligned).*)$", log, re.MULTILINE)
    if status not in (0, FOUND, None) and not faults:
        faults = [f"ended with status {status}: {log.strip().splitlines()[-1][:300] if log.strip() else 'no output'}"]
    if status == FOUND and not faults:
        faults = ["errors, but none of a kind that this page knows: see the log"]
    return {
        "launches that ended": len(ended),
        "last": ended[-1] if ended else "none",
        "time": "was up" if status is None else "was enough",
        "faults": "; ".join(dict.fromkeys(faults))[:1000],
    }

"""Stage "trainer": `python -m phi_fast.train` under ZeRO-2, ended by kill -9, goes on bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Session
from phi_fast.data import stdlib_corpus
from phi_fast.json_files import read_lines

SAVED, LAST = 3, 6
"""The step after which a checkpoint is saved, and the one that both runs must reach."""
COMPARED = ("loss", "grad_norm", "loss_scale", "lr")


class Differs(Exception):
    """The resumed run does not repeat what was computed before the kill."""


class TrainerEnded(Exception):
    """The trainer ended before it was killed."""


def check(session: Session) -> None:
    """Train past a checkpoint, kill, resume, and compare the steps that both computed. Raises Differs, TrainerEnded."""
    data, run = session.scratch / "stdlib", session.scratch / "run"
    stdlib_corpus.prepare(data)
    command = [sys.executable, "-m", "phi_fast.train", *options(data, run, dry=session.dry)]
    began = time.monotonic()
    before = until_killed(command, run, session)
    session.put("trainer", {"seconds until the kill": time.monotonic() - began} | speed(before))
    began = time.monotonic()
    (run / "metrics.jsonl").rename(run / "before.jsonl")
    after = until_killed([*command, "--resume"], run, session)
    session.put("resumed", {"seconds until the same step": time.monotonic() - began})
    rows = compared(before, after)
    session.put("steps computed twice", rows)
    if wrong := [row["step"] for row in rows if not row["the same, bit for bit"]]:
        raise Differs(f"steps {', '.join(map(str, wrong))} differ after the resume")


def options(data: Path, run: Path, *, dry: bool) -> list[str]:
    """phi-1.5 on the standard library's corpus; in a dry run a model of one layer."""
    words = ["--data", str(data), "--run-dir", str(run), "--save-every", str(SAVED), "--save-minutes", "0"]
    words += ["--val-every", "0", "--sample-tokens", "0", "--keep-last", "1", "--tokens", "1e9", "--log-every", "1"]
    if dry:
        shape = {"hidden-size": 64, "num-attention-heads": 1, "num-hidden-layers": 1}
        sizes = {"sequence-length": 32, "global-batch-size": 4}
        words += ["--device", "cpu"]
    else:
        shape = {"hidden-size": 2048, "num-attention-heads": 32, "num-hidden-layers": 24, "vocab-size": 51200}
        shape |= {"max-position-embeddings": 2048}
        sizes = {"sequence-length": 2048, "global-batch-size": 8, "micro-batch-size": 8}
    for name, value in shape.items():
        words += [f"--model.{name}", str(value)]
    for name, value in sizes.items():
        words += [f"--{name}", str(value)]
    return words


def until_killed(command: list[str], run: Path, session: Session) -> dict[int, dict[str, Any]]:
    """Run the trainer until it has told of step `LAST`, then end it by SIGKILL: its records by step."""
    log = session.scratch / "trainer.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        while LAST not in (found := records(run)):
            if process.poll() is not None:
                end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
                raise TrainerEnded(f"status {process.returncode} before step {LAST}: {end}")
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    return found


def environment() -> dict[str, str]:
    """Without a launcher's variables: one process."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def records(run: Path) -> dict[int, dict[str, Any]]:
    """The steps in a run's metrics, by number."""
    try:
        return {record["step"]: record for _, record in read_lines(run / "metrics.jsonl") if record["step"]}
    except FileNotFoundError:
        return {}


def compared(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps after the checkpoint, that the resumed run computed again."""
    same: Callable[[int], bool] = lambda step: all(before[step][n] == after[step][n] for n in COMPARED)  # noqa: E731
    steps = range(SAVED + 1, LAST + 1)
    return [{"step": s, "loss": before[s]["loss"], "the same, bit for bit": s in after and same(s)} for s in steps]


def speed(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the trainer itself says of its last step."""
    last = found[LAST]
    return {"tokens/s": last["tokens_per_s"], "ms per step": last["step_ms"], "MFU, attention in full": last["mfu"]}

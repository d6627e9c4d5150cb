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

STEPS = 3
"""Steps after the checkpoint that are computed twice."""
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
    # Saving goes on beside the next steps: the checkpoint is there some steps after its own.
    before = until_killed(command, session, run, lambda: saved(run) and saved(run) + STEPS)
    session.put("trainer", {"seconds until the kill": time.monotonic() - began} | speed(before))
    began, start = time.monotonic(), saved(run)
    (run / "metrics.jsonl").rename(run / "before.jsonl")
    after = until_killed([*command, "--resume"], session, run, lambda: start + STEPS)
    session.put("resumed", {"seconds until the same step": time.monotonic() - began})
    rows = compared(before, after, start)
    session.put("steps computed twice", rows)
    if wrong := [row["step"] for row in rows if not row["the same, bit for bit"]]:
        raise Differs(f"steps {', '.join(map(str, wrong))} differ after the resume")


def options(data: Path, run: Path, *, dry: bool) -> list[str]:
    """phi-1.5 on the standard library's corpus; in a dry run a model of one layer."""
    every = 20 if dry else 4  # so that no second checkpoint is whole before the kill
    words = ["--data", str(data), "--run-dir", str(run), "--save-every", str(every), "--save-minutes", "0"]
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


def until_killed(command: list[str], session: Session, run: Path, last: Callable[[], int]) -> dict[int, dict[str, Any]]:
    """Run the trainer until it has told of step `last()` (0: not known yet), then end it by SIGKILL: its records."""
    log = session.scratch / "trainer.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        while not (step := last()) or step not in records(run):
            if process.poll() is not None:
                end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
                raise TrainerEnded(f"status {process.returncode} before step {step or 'of a checkpoint'}: {end}")
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    return records(run)


def saved(run: Path) -> int:
    """The step of the newest complete checkpoint; 0: there is none."""
    try:
        return int((run / "checkpoints" / "latest").read_text(encoding="utf-8").rpartition("-")[2])
    except FileNotFoundError:
        return 0


def environment() -> dict[str, str]:
    """Without a launcher's variables: one process."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def records(run: Path) -> dict[int, dict[str, Any]]:
    """The steps in a run's metrics, by number."""
    try:
        return {record["step"]: record for _, record in read_lines(run / "metrics.jsonl") if record["step"]}
    except FileNotFoundError:
        return {}


def compared(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """The steps after the checkpoint of step `start`, which the resumed run computed again."""

    def same(step: int) -> bool:
        return step in before and step in after and all(before[step][n] == after[step][n] for n in COMPARED)

    steps = range(start + 1, start + STEPS + 1)
    return [{"step": s, "loss": before.get(s, {}).get("loss"), "the same, bit for bit": same(s)} for s in steps]


def speed(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the trainer itself says of its last step."""
    last = found[max(found)]
    return {"tokens/s": last["tokens_per_s"], "ms per step": last["step_ms"], "MFU, attention in full": last["mfu"]}

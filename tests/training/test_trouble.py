"""Errors outside the steps: every rank saves before the run ends, and the run can resume when the cause is gone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from trainer_processes import Trainer, arguments, finish, latest, losses, start, until, without_launcher

from phi_fast.train import INTERRUPTED


def saved_and_goes_on(words: list[str], run: Path, output: str, *, step: int, ranks: int) -> None:
    """Assert that the run was saved at `step` before its error, and that a resume takes two more steps."""
    assert "Traceback" not in output
    assert latest(run).name == f"step-{step}"
    assert f"saved {run / 'checkpoints' / f'step-{step}'}" in output
    again = ["--run-dir", str(run), "--resume", "--stop-after", "2"]
    finish(again, run.parent / "output", ranks=ranks, expect=INTERRUPTED)
    assert len(losses(run)) == step + 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_validation_that_fails(data: Path, tmp_path: Path, ranks: int) -> None:
    words = arguments(data, tmp_path / "run", 20, val_every=3, val_rows=8)
    fault = {"fault": "broken_validation", "given": [0, 2][-ranks:]}  # the last rank's, at step 3
    output = finish(words, tmp_path / "output", ranks=ranks, expect=2, **fault)
    assert "validation.bin was cut short while in use" in output
    saved_and_goes_on(words, tmp_path / "run", output, step=3, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_task_that_cannot_be_scored(data: Path, questions: Path, tmp_path: Path, ranks: int) -> None:
    words = arguments(data, tmp_path / "run", 20, eval_every=3, eval_tasks="arc_easy", eval_data=questions)
    words += ["--eval-limit", "2"]
    output = finish(words, tmp_path / "output", ranks=ranks, expect=2, fault="broken_task", given=[1, 0])
    assert "error: the model could not be scored on --eval-tasks: RuntimeError: no such thing" in output
    saved_and_goes_on(words, tmp_path / "run", output, step=3, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_room_for_metrics(data: Path, tmp_path: Path, ranks: int) -> None:
    words = arguments(data, tmp_path / "run", 20)
    output = finish(words, tmp_path / "output", ranks=ranks, expect=2, fault="no_room_for_metrics", given=[4])
    assert "metrics.jsonl cannot be written (No space left on device): make room" in output
    assert "Traceback" not in output
    # Step 4's record could not be written. Every rank learns of it at the end of the next step, so step 5 may be saved.
    step = int(latest(tmp_path / "run").name.removeprefix("step-"))
    assert step in (4, 5)
    again = ["--run-dir", str(tmp_path / "run"), "--resume", "--stop-after", "2"]
    finish(again, tmp_path / "output", ranks=ranks, expect=INTERRUPTED)
    assert latest(tmp_path / "run").name == f"step-{step + 2}"


def test_no_room_for_a_checkpoint_is_told_before_the_first_step(data: Path, tmp_path: Path) -> None:
    """The size that is checked is that of a checkpoint which the same run saves when there is room."""
    words = arguments(data, tmp_path / "run", 1, precision="bf16")
    finish(words, tmp_path / "output", fault="full_file_system", given=[10**9])
    files = [path.stat().st_size for path in latest(tmp_path / "run").glob("*.safetensors")]
    assert len(files) == 2
    needed = sum(files) - 20_000  # their headers are smaller than that
    words = arguments(data, tmp_path / "other", 1, precision="bf16")
    output = finish(words, tmp_path / "output", expect=2, fault="full_file_system", given=[needed - 20_000])
    assert f"error: {tmp_path / 'other'} has 0.00 GB of room, and a checkpoint of this run takes " in output
    assert "name a --run-dir on another file system" in output
    assert not (tmp_path / "other").exists()


def waits_for(trainer: Trainer, text: str) -> None:
    until(lambda: text in trainer.output or trainer.status is not None, timeout=90)
    assert text in trainer.output, trainer.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_checkpoint_is_read(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 8)
    finish([*words, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    kept = {path.name: path.read_bytes() for path in latest(run).iterdir()}
    (trainer,) = start([*words, "--resume"], tmp_path / "output", fault="slow_read", given=[60])
    waits_for(trainer, "reading the checkpoint")
    began = time.monotonic()
    trainer.signal(number)
    assert trainer.wait() == INTERRUPTED
    assert time.monotonic() - began < 10
    assert f"ended by {number.name} before a step was taken" in trainer.output
    assert "Traceback" not in trainer.output
    assert {path.name: path.read_bytes() for path in latest(run).iterdir()} == kept
    assert not (run / ".lock").exists()


def test_a_wait_for_the_owner_says_so_and_ends_on_a_signal(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 100_000, elastic=True)
    (first,) = start(words, tmp_path / "first")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2)
    (second,) = start(words, tmp_path / "second")
    waits_for(second, f"the run directory {run} is in use by process {first.pid} on ")
    assert "waiting up to 15 s for it to end" in second.output
    began = time.monotonic()
    second.signal(signal.SIGTERM)
    assert second.wait() == INTERRUPTED
    assert time.monotonic() - began < 10
    first.signal(signal.SIGTERM)
    assert first.wait() == INTERRUPTED
    assert (run / "config.json").is_file()


def test_a_signal_while_the_corpus_is_built(tmp_path: Path) -> None:
    """No incomplete corpus is left where a corpus is looked for."""
    command = [sys.executable, "-m", "phi_fast.train"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=without_launcher(), **streams) as started:
        assert started.stdout is not None
        lines = [started.stdout.readline()]
        until(lambda: (tmp_path / "data").exists(), timeout=120)
        started.send_signal(signal.SIGTERM)
        lines += started.stdout.readlines()
    assert started.returncode == INTERRUPTED
    assert "ended by SIGTERM before a step was taken" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not list((tmp_path / "data").rglob("manifest.json"))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.json"))


def test_a_port_that_is_taken_is_no_reason_to_start_again(data: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        output = refused(data, tmp_path, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    assert f"error: MASTER_PORT={port} is in use on this machine by another program: give a free one" in output


def test_an_address_that_is_none_is_no_reason_to_start_again(data: Path, tmp_path: Path) -> None:
    output = refused(data, tmp_path, {"MASTER_ADDR": "no-such-machine.invalid", "MASTER_PORT": "29500"})
    assert "error: MASTER_ADDR=no-such-machine.invalid cannot be resolved on this machine" in output


def refused(data: Path, folder: Path, environment: dict[str, str]) -> str:
    """Start rank 0 of 2 and return its output; it must exit with status 2, so that no scheduler restarts it."""
    given: dict[str, Any] = environment | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    words = arguments(data, folder / "run", 4, rank_timeout=1)
    output = finish(words, folder / "output", expect=2, fault="environment", given=given)
    assert "Traceback" not in output
    assert not (folder / "run").exists()
    return output


@pytest.mark.parametrize(
    "command",
    ["train", "generate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "verify", "plan"))],
)
def test_an_instruction_set_that_is_none(command: str, tmp_path: Path) -> None:
    from model_folders import make_source, random_weights

    model = str(make_source(tmp_path / "model", "hf", random_weights()))
    words = {
        "train": ["--run-dir", str(tmp_path / "run")],
        "generate": ["--model", model, "--prompt", "x"],
        "evaluate": ["--model", model, "--tasks", "piqa"],
        "verify": [],
        "plan": ["--device", "cpu"],
    }
    environment = {**without_launcher(), "PHI_FAST_ISA": "avx999"}
    done = subprocess.run(
        [sys.executable, "-m", f"phi_fast.{command}", *words[command]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert ": PHI_FAST_ISA=avx999: expected one of amx, avx512_bf16, avx512, avx2, portable" in done.stderr
    assert "Traceback" not in done.stderr

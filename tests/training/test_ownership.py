"""Ownership of run directories, files of earlier runs in them, options of a resume, and early ends of a start."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from trainer_processes import arguments, finish, latest, losses, make_corpora, start, until

from phi_fast.report import run as report
from phi_fast.train import INTERRUPTED


def seed_of(run: Path) -> tuple[int, int]:
    """Return the seeds in config.json and in the newest checkpoint."""
    config, state = (json.loads(path.read_text()) for path in (run / "config.json", latest(run) / "state.json"))
    return config["seed"], state["options"]["seed"]


def test_two_starts_with_one_run_dir_are_one_run_and_a_refusal(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (first,) = start(arguments(data, run, 100_000, seed=1), tmp_path / "first")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2)
    error = finish(arguments(data, run, 4, seed=2), tmp_path / "second", expect=2)
    assert f"error: the run directory {run} is in use by process {first.pid} on " in error
    assert "name another --run-dir" in error
    first.signal(signal.SIGTERM)
    assert first.wait() == INTERRUPTED
    assert seed_of(run) == (1, 1)
    assert not (run / ".lock").exists()


def test_a_killed_owner_leaves_the_directory_free(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (first,) = start(arguments(data, run, 100_000, elastic=True), tmp_path / "first")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2)
    first.signal(signal.SIGKILL)
    first.wait()
    finish(arguments(data, run, 100_000, elastic=True, stop_after=2), tmp_path / "second", expect=INTERRUPTED)
    assert len(losses(run)) == 2


def test_what_another_run_left_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    error = finish(arguments(data, run, 4), tmp_path / "output", expect=2)
    assert f"error: --run-dir {run} holds metrics.jsonl of a run that saved no checkpoint" in error
    assert (run / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_damaged_corpus_ends_the_run_after_a_save(tmp_path: Path) -> None:
    """A corpus whose modification time alone changed does not end the run."""
    data, run = make_corpora(tmp_path / "data"), tmp_path / "run"
    (trainer,) = start(arguments(data, run, 100_000), tmp_path / "output")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
    file = data / "docs" / "train.bin"
    os.utime(file)
    steps = len(losses(run))
    until(lambda: len(losses(run)) > steps + 20)
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    assert trainer.wait() == 2
    assert f"error: {file} was changed while in use" in trainer.output
    done = len(losses(run))
    assert latest(run).name == f"step-{done}"
    file.write_bytes(content)
    finish(["--resume", "--run-dir", str(run), "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    assert latest(run).name == f"step-{done + 2}"


def test_a_run_is_saved_by_time(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (trainer,) = start(arguments(data, run, 100_000, save_minutes=0.01), tmp_path / "output")
    until(lambda: (run / "checkpoints" / "latest").exists())
    trainer.signal(signal.SIGKILL)
    trainer.wait()


def test_a_hangup_saves(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (trainer,) = start(arguments(data, run, 100_000), tmp_path / "output")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2)
    trainer.signal(signal.SIGHUP)
    assert trainer.wait() == INTERRUPTED
    assert latest(run).name == f"step-{len(losses(run))}"


@pytest.mark.slow
def test_a_stop_while_joining_ends_at_once(data: Path, tmp_path: Path) -> None:
    """The second rank never joins, and the first waits in C++ code, where Python's signal handlers do not run."""
    trainers = start(
        arguments(data, tmp_path / "run", 4), tmp_path / "output", ranks=2, fault="sleep_on", given=[0, 60]
    )
    time.sleep(3)
    began = time.monotonic()
    trainers[0].signal(signal.SIGTERM)
    assert trainers[0].wait() == INTERRUPTED
    assert time.monotonic() - began < 20
    assert "ended by SIGTERM before a step was taken" in trainers[0].output
    assert not (tmp_path / "run").exists()
    trainers[1].signal(signal.SIGKILL)
    trainers[1].wait()


def test_a_resume_goes_on_with_the_runs_own_options(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 8, schedule="linear", learning_rate=1e-3)
    finish([*words, "--stop-after", "3"], tmp_path / "output", expect=INTERRUPTED)
    bare = ["--resume", "--run-dir", str(run)]
    error = finish([*bare, "--learning-rate", "1e-4"], tmp_path / "output", expect=2)
    assert "learning_rate was 0.001, is now 0.0001" in error
    assert "--allow-change" in error
    changed = [*bare, "--learning-rate", "1e-4", "--allow-change", "--stop-after", "1"]
    assert "learning_rate was 0.001, is now 0.0001" in finish(changed, tmp_path / "output", expect=INTERRUPTED)
    finish(bare, tmp_path / "output")
    assert len(losses(run)) == 8


def test_a_corpus_that_is_not_there_is_not_built_elsewhere(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path / "typo"), "--run-dir", str(tmp_path / "run")]
    assert f"--data {tmp_path / 'typo'} does not exist" in finish(words, tmp_path / "output", expect=2)
    assert not (tmp_path / "typo").exists()


def test_a_corpus_without_validation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = make_corpora(tmp_path / "data")
    manifest = json.loads((data / "docs" / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    (data / "docs" / "manifest.json").write_text(json.dumps(manifest))
    error = finish(arguments(data, tmp_path / "run", 4, val_every=2), tmp_path / "output", expect=2)
    assert "has no validation split" in error
    finish(arguments(data, tmp_path / "run", 4, val_every=0), tmp_path / "output")  # the advice


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "abc", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "WORLD_SIZE=abc: expected",
        ),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "but not RANK: a launcher sets them all"),
        ({"PHI_FAST_ISA": "avx999"}, "PHI_FAST_ISA=avx999: expected one of"),
    ],
)
def test_a_malformed_environment_is_told(data: Path, tmp_path: Path, environment: dict[str, str], message: str) -> None:
    words = arguments(data, tmp_path / "run", 4)
    output = finish(words, tmp_path / "output", expect=2, fault="environment", given=environment)
    assert message in output and "Traceback" not in output


def test_a_report_of_several_runs_leaves_the_firsts_own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi_fast.report import Options

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 2.0, "lr": 1e-3}\n')
        (tmp_path / name / "report.html").write_text("its own")
    monkeypatch.setattr("phi_fast.report.read_runs", lambda runs: [])
    monkeypatch.setattr("phi_fast.report.page", lambda runs: "both")
    assert report(Options((tmp_path / "a", tmp_path / "b"))) == tmp_path / "report-a-b.html"
    assert (tmp_path / "a" / "report.html").read_text() == "its own"

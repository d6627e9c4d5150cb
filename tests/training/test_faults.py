"""Runs survive kills at any moment, full disks, signals, dead and frozen ranks, and changed numbers of ranks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer_processes import (
    Trainer,
    arguments,
    finish,
    latest,
    losses,
    optimizer_state,
    start,
    until,
    weights,
)

from phi_fast.train import INTERRUPTED

STEPS = 12
SAVES = {"save_every": 2, "elastic": True}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(arguments(data, run, STEPS, **SAVES), run.parent / "output")
    return run


def complete_steps(run: Path) -> list[int]:
    """List the steps of the checkpoints under their final names, which they get when they are complete."""
    return [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]


def expect_resume(output: str, steps: list[int]) -> None:
    """Assert that the run resumed from the newest checkpoint, if there was one, and passed over none."""
    assert "passed over" not in output
    assert ("resumed from" in output) == bool(steps), output
    if steps:
        assert f"step-{max(steps)}\n" in output.replace("resumed from", ""), (output, steps)


def assert_same(run: Path, expected: Path) -> None:
    assert losses(run) == losses(expected)
    assert latest(run).name == latest(expected).name
    for ours, theirs in ((weights(run), weights(expected)), (optimizer_state(run), optimizer_state(expected))):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def end_of(trainer: Trainer, at: float | None) -> bool:
    """Kill the trainer `at` seconds from now, or let it end (None); returns whether a kill ended it."""
    deadline = time.monotonic() + (at if at is not None else 120)
    while trainer.status is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if at is not None:
        trainer.signal(signal.SIGKILL)
    status = trainer.wait()
    assert status in (0, -signal.SIGKILL), trainer.output
    return status != 0


def killed_and_resumed(data: Path, run: Path, undisturbed: Path, choose: random.Random, most: int) -> int:
    """Kill and resume a run up to `most` times, at random moments and before random file operations.

    Asserts that it ends like the undisturbed run; returns the number of kills.
    """
    words = arguments(data, run, STEPS, **SAVES)
    killed, ended = 0, False
    while not ended:
        steps = complete_steps(run)
        by_time = choose.random() < 0.5
        given = [0 if by_time or killed >= most else choose.randint(1, 150)]
        (trainer,) = start(words, run.parent / "output", fault="die_at_file_operation", given=given)
        ended = not end_of(trainer, choose.uniform(0.2, 1.5) if by_time and killed < most else None)
        killed += not ended
        if ended or "resumed from" in trainer.output:
            expect_resume(trainer.output, steps)
    assert_same(run, undisturbed)
    return killed


def survive_kills(data: Path, folder: Path, undisturbed: Path, kills: int, seed: int) -> None:
    """Kill and resume one run after another, until there were `kills` kills."""
    choose = random.Random(seed)
    killed, number = 0, 0
    while killed < kills:
        killed += killed_and_resumed(data, folder / f"run-{number}", undisturbed, choose, kills - killed)
        number += 1


def test_killed_now_and_then(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    survive_kills(data, tmp_path, undisturbed, kills=6, seed=1)


@pytest.mark.slow
def test_killed_at_200_random_moments(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    survive_kills(data, tmp_path, undisturbed, kills=200, seed=2)


def file_operations(data: Path, folder: Path) -> int:
    """Count the file operations of two saves and removals: the last operation before which a run can be killed."""
    low, high = 1, 400
    while low < high:
        middle = (low + high) // 2
        words = arguments(data, folder / f"probe-{middle}", 4, save_every=2, keep_last=1)
        (trainer,) = start(words, folder / "output", fault="die_at_file_operation", given=[middle])
        low, high = (middle + 1, high) if end_of(trainer, None) else (low, middle)
    return low - 1


def killed_before(operation: int, data: Path, folder: Path, expected: Path) -> None:
    run = folder / f"run-{operation}"
    words = arguments(data, run, 4, save_every=2, keep_last=1, elastic=True)
    (trainer,) = start(words, folder / "output", fault="die_at_file_operation", given=[operation])
    assert trainer.wait() == -signal.SIGKILL, trainer.output
    steps = complete_steps(run)
    expect_resume(finish(words, folder / "output"), steps)
    assert_same(run, expected)


@pytest.fixture(scope="module")
def four_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("four") / "run"
    finish(arguments(data, run, 4, save_every=2, keep_last=1), run.parent / "output")
    return run


@pytest.mark.parametrize("operation", [9, 22, 33])
def test_killed_before_a_file_operation(data: Path, four_steps: Path, tmp_path: Path, operation: int) -> None:
    killed_before(operation, data, tmp_path, four_steps)


@pytest.mark.slow
def test_killed_before_every_file_operation(data: Path, four_steps: Path, tmp_path: Path) -> None:
    operations = file_operations(data, tmp_path)
    assert operations > 40
    for operation in range(1, operations + 1):
        killed_before(operation, data, tmp_path, four_steps)


def test_two_one_four_ranks_follow_one(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", STEPS, resume=True, stop_after=4)
    finish([word for word in words if word != "--resume"], tmp_path / "output", ranks=2, expect=INTERRUPTED)
    finish(words, tmp_path / "output", ranks=1, expect=INTERRUPTED)
    finish(words, tmp_path / "output", ranks=4)
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), abs=1e-4)
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=0, atol=1e-4)


def test_two_ranks_resume_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """One rank is killed while both save; then both are started again."""
    whole = arguments(data, tmp_path / "whole", 8, save_every=2)
    finish(whole, tmp_path / "output", ranks=2)
    words = arguments(data, tmp_path / "parts", 8, save_every=2, elastic=True)
    first, second = start(words, tmp_path / "output", ranks=2, fault="die_at_file_operation", given=[0, 12])
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == INTERRUPTED
    assert "error: rank 0 of 2 lost the others" in first.output
    steps = complete_steps(tmp_path / "parts")
    expect_resume(finish(words, tmp_path / "output", ranks=2), steps)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for rank in range(2):
        name = f"rank-{rank}-of-2.safetensors"
        assert (latest(tmp_path / "parts") / name).read_bytes() == (latest(tmp_path / "whole") / name).read_bytes()


@pytest.mark.parametrize("fault", ["die_at_step", "freeze_at_step"])
def test_a_lost_rank_ends_the_run(data: Path, tmp_path: Path, fault: str) -> None:
    words = arguments(data, tmp_path / "run", 50, save_every=2, rank_timeout=4)
    first, second = start(words, tmp_path / "output", ranks=2, fault=fault, given=[0, 7])
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(losses(tmp_path / "run")) >= 6)
    began = time.monotonic()
    assert first.wait() == INTERRUPTED, first.output
    assert time.monotonic() - began < (30 if fault == "freeze_at_step" else 15)
    assert "error: rank 0 of 2 lost the others (" in first.output
    assert "Traceback" not in first.output
    second.signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    # Step 4's save had ended on both ranks before step 6's began; whether step 6's ended depends on timing.
    assert 4 in complete_steps(tmp_path / "run")


def test_what_is_wrong_on_one_machine_is_told_by_its_rank(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4, rank_timeout=8)
    first, second = start(words, tmp_path / "output", ranks=2, fault="no_corpora", given=[0, 1])
    assert (second.wait(), first.wait()) == (2, INTERRUPTED)
    assert second.output.startswith("error on rank 1: corpus 'docs' is not at ")
    assert "error: rank 0 of 2 lost the others (" in first.output


def test_a_full_disk_costs_no_checkpoint(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 20, save_every=2)
    finish([*words, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    kept = {path.name: path.read_bytes() for path in latest(run).iterdir()}
    output = finish([*words, "--resume"], tmp_path / "output", expect=2, fault="full_disk", given=[100_000])
    assert "error: " in output
    assert "step-4 was not saved: " in output
    assert "File too large" in output
    assert "Earlier checkpoints are untouched" in output
    assert "Traceback" not in output
    assert {path.name: path.read_bytes() for path in latest(run).iterdir()} == kept
    assert complete_steps(run) == [2]
    config = (run / "config.json").read_bytes()
    output = finish([*words, "--resume"], tmp_path / "output", expect=2, fault="full_disk", given=[700])
    assert f"error: {run} cannot be written (File too large): make room" in output
    assert (run / "config.json").read_bytes() == config
    expect_resume(finish([*words, "--resume"], tmp_path / "output"), [2])


def test_one_rank_that_cannot_write_fails_the_save_on_both(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 20, save_every=2)
    output = finish(words, tmp_path / "output", ranks=2, expect=2, fault="full_disk", given=[0, 100_000])
    assert "step-2 was not saved: " in output
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_saving_does_not_hold_up_the_steps(data: Path, tmp_path: Path) -> None:
    """Steps go on while a slow disk takes 0.3 s per sync, and the exit waits for the save."""
    run = tmp_path / "run"
    (trainer,) = start(arguments(data, run, 60, save_every=20), tmp_path / "output", fault="slow_disk", given=[0.3])
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 25)
    assert not (run / "checkpoints" / "latest").exists()
    assert trainer.wait() == 0
    assert sorted(complete_steps(run)) == [40, 60]


def test_usr1_saves_and_goes_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (trainer,) = start(arguments(data, run, 100_000), tmp_path / "output")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
    trainer.signal(signal.SIGUSR1)
    until(lambda: (run / "checkpoints" / "latest").exists())
    (step,) = complete_steps(run)
    until(lambda: len(losses(run)) > step + 3)
    trainer.signal(signal.SIGTERM)
    assert trainer.wait() == INTERRUPTED
    assert len(complete_steps(run)) == 2


def test_a_signal_to_one_rank_in_validation_stops_both(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 10, val_every=5, val_rows=64, micro_batch_size=2)
    output = finish(words, tmp_path / "output", ranks=2, expect=INTERRUPTED, fault="signal_in_validation", given=[0, 1])
    assert "stopped at step 0 of 10" in output
    assert "before training" not in output
    assert "went on" not in (tmp_path / "output" / "rank-1.txt").read_text()
    assert complete_steps(tmp_path / "run") == [0]
    assert "resumed from" in finish([*words, "--resume"], tmp_path / "output", ranks=2)


def test_a_stop_before_the_first_new_step_keeps_the_checkpoint(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4)
    finish(words, tmp_path / "output")
    before = (latest(tmp_path / "run") / "manifest.json").stat().st_ino
    finish([*words, "--resume"], tmp_path / "output")
    assert (latest(tmp_path / "run") / "manifest.json").stat().st_ino == before


def test_injected_overflows_skip_exactly_those_steps(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 10, precision="fp16", initial_loss_scale=256)
    finish(words, tmp_path / "output", fault="overflow_at_steps", given=[3, 4, 8])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if '"skipped": true' in line] == [3, 4, 8]


@pytest.mark.parametrize(("ranks", "step"), [(1, "fused"), (2, "fused"), (1, "deepspeed")])
def test_weights_that_an_update_made_infinite_are_never_saved(
    data: Path, tmp_path: Path, ranks: int, step: str
) -> None:
    """At a rate that makes fp16 weights overflow, the last good checkpoint is kept; a lower rate can resume from it."""
    run = tmp_path / "run"
    options = {"precision": "fp16", "initial_loss_scale": 256, "save_every": 1, "keep_last": 1, "zero_step": step}
    words = arguments(data, run, 8, **options)
    finish([*words, "--stop-after", "3"], tmp_path / "output", ranks=ranks, expect=INTERRUPTED)
    kept = {path.name: path.read_bytes() for path in latest(run).iterdir()}
    output = finish([*words, "--resume", "--learning-rate", "1e6"], tmp_path / "output", ranks=ranks, expect=2)
    assert "not finite" in output and "--resume" in output and "lower --learning-rate" in output
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-3"]
    assert {path.name: path.read_bytes() for path in latest(run).iterdir()} == kept
    finish([*words, "--resume"], tmp_path / "output", ranks=ranks)
    assert latest(run).name == "step-8"


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, STEPS, **SAVES)
    finish([*words, "--stop-after", "8"], tmp_path / "output", expect=INTERRUPTED)
    damaged = run / "checkpoints" / "step-8" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    output = finish(words, tmp_path / "output")
    assert "step-8 is passed over: model.safetensors has " in output
    assert f"resumed from {run / 'checkpoints' / 'step-6'}\n" in output
    assert_same(run, undisturbed)
    for path in (run / "checkpoints").glob("step-*"):
        (path / "state.json").unlink()
    for flag in ("--elastic", "--resume"):
        end = words.index("--elastic")
        output = finish([*words[:end], flag, *words[end + 1 :]], tmp_path / "output", expect=2)
        assert "step-12 is passed over: state.json is missing" in output
        assert f"error: {flag}: {run / 'checkpoints'} has no complete checkpoint; start without {flag}, in " in output


def test_a_checkpoint_of_another_run_is_refused_and_the_one_before_offered(data: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    words = arguments(data, run, 8, save_every=2)
    finish([*words, "--stop-after", "4"], tmp_path / "output", expect=INTERRUPTED)
    finish(arguments(data, other, 6, seed=5), tmp_path / "output")
    (other / "checkpoints" / "step-6").rename(run / "checkpoints" / "step-6")
    error = finish([*words, "--resume"], tmp_path / "output", expect=2)
    step_4, step_6 = (run / "checkpoints" / name for name in ("step-4", "step-6"))
    assert (
        f"error: {step_6} belongs to another run: seed is 5, now 1337. {step_4} is complete and belongs to this run: "
        in error
    )
    assert f"to go on from it, move {step_6} away" in error
    step_6.rename(tmp_path / "away")
    assert f"resumed from {step_4}" in finish([*words, "--resume"], tmp_path / "output")


def test_a_checkpoint_of_other_data_or_another_model_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 4)
    finish(words, tmp_path / "output")
    changed = shutil.copytree(data, tmp_path / "changed")
    shutil.rmtree(changed / "code")
    shutil.copytree(data / "docs", changed / "code")
    for changes, reason in (
        ({"data": changed}, "corpus 'code' at "),
        ({"implementation": "reference"}, "implementation is phi, now reference"),
        ({"decay": "all"}, "decay is matrices, now all"),
        ({"model.hidden_size": 128, "model.num_attention_heads": 2}, "model is {"),
    ):
        words = arguments(data, run, 8, resume=True)
        for name, value in changes.items():
            words += [f"--{name.replace('_', '-')}", str(value)]  # the last occurrence counts
        error = finish(words, tmp_path / "output", expect=2)
        assert f"error: {run / 'checkpoints' / 'step-4'} belongs to another run: {reason}" in error
        assert "Traceback" not in error
    assert complete_steps(run) == [4]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(data: Path, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "output"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    words = arguments(data, run, 600, save_every=20, elastic=True)
    with text.open("w") as output:
        process = subprocess.Popen(
            [*torchrun, "--max-restarts", "1", "-m", "phi_fast.train", *words],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        until(lambda: (run / "checkpoints" / "latest").exists(), timeout=240)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=240) == 0, text.read_text()
    finally:
        process.terminate()
    assert "resumed from" in text.read_text()
    assert len(losses(run)) == 600
    assert latest(run).name == "step-600"

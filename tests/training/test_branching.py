"""Warmup-stable-decay: its learning rates, and decays that branch off a run's checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from trainer_processes import arguments, finish, latest, losses, optimizer_state, weights

from phi_fast.errors import UsageError
from phi_fast.recipes import RECIPES
from phi_fast.train import INTERRUPTED

DECAY = {"schedule": "wsd", "decay_steps": 4}


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = RECIPES["tiny"].replace(
        schedule="wsd", decay_steps=4, warmup_steps=2, learning_rate=0.8, final_learning_rate=0.4, tokens=10 * 2048
    )
    recipe.check()
    rates = [recipe.learning_rate_at(step) for step in range(11)]
    assert rates[:7] == [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert rates[7:] == pytest.approx([0.7, 0.6, 0.5, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd"}, r"decay_steps=0: --schedule wsd needs --decay-steps from 1 to 340"),
        (
            {"schedule": "wsd", "decay_steps": 340, "warmup_steps": 1},
            r"decay_steps=340: .* from 1 to 339, the run's 340",
        ),
        ({"decay_steps": 5}, r"decay_steps=5 is for --schedule wsd, and schedule is 'constant'"),
        ({"schedule": "wsd", "decay_steps": -1}, r"decay_steps=-1: "),
    ],
)
def test_a_decay_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RECIPES["tiny"].replace(**changes).check()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps at a constant learning rate, with checkpoints at 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("base")
    finish(arguments(data, folder / "run", 8, save_every=3, keep_last=0, skip_spikes=50), folder)
    return folder / "run"


def branch(base: Path, run: Path, **changes: object) -> list[str]:
    words = ["--run-dir", str(run), "--branch-from", str(base)]
    for name, value in changes.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def the_same(one: Path, other: Path) -> bool:
    return all(
        torch.equal(state(one)[name], tensor)
        for state in (weights, optimizer_state)
        for name, tensor in state(other).items()
    )


def test_a_branched_decay_is_the_run_that_had_it_from_the_start(data: Path, base: Path, tmp_path: Path) -> None:
    """Bit for bit: losses, weights and optimizer; also where the branch is stopped and resumed."""
    whole = arguments(data, tmp_path / "whole", 10, skip_spikes=50, **DECAY)
    finish(whole, tmp_path)
    output = finish(branch(base / "checkpoints" / "step-6", tmp_path / "branch", **DECAY), tmp_path)
    assert f"branched from {base / 'checkpoints' / 'step-6'}" in output
    assert "schedule was constant, is now wsd" in output
    assert [record["step"] for record in records(tmp_path / "branch")] == [7, 8, 9, 10]
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")[6:]
    assert the_same(tmp_path / "branch", tmp_path / "whole")
    finish(
        [*branch(base / "checkpoints" / "step-6", tmp_path / "parts", **DECAY), "--stop-after", "2"],
        tmp_path,
        expect=INTERRUPTED,
    )
    finish(["--resume", "--run-dir", str(tmp_path / "parts")], tmp_path)
    assert losses(tmp_path / "parts") == losses(tmp_path / "branch")
    assert the_same(tmp_path / "parts", tmp_path / "whole")


def test_a_run_is_branched_at_its_newest_checkpoint_and_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    finish(branch(base, tmp_path / "branch", tokens=10 * 64, learning_rate=0.01), tmp_path)
    config = json.loads((tmp_path / "branch" / "config.json").read_text())
    assert config["branch_from"] == str(base / "checkpoints" / "step-8")
    assert [record["step"] for record in records(tmp_path / "branch")] == [9, 10]
    assert {record["lr"] for record in records(tmp_path / "branch")} == {0.01}
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_an_elastic_branch_goes_on_with_its_own_checkpoints(base: Path, tmp_path: Path) -> None:
    """The run that it branched from may be gone by then."""
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    words = [*branch(copy / "checkpoints" / "step-3", tmp_path / "run", **DECAY), "--elastic"]
    finish([*words, "--stop-after", "2"], tmp_path, expect=INTERRUPTED)
    shutil.rmtree(copy)
    finish(words, tmp_path)
    assert [record["step"] for record in records(tmp_path / "run")] == [4, 5, 6, 7]
    finish(branch(base / "checkpoints" / "step-3", tmp_path / "once", **DECAY), tmp_path)
    assert losses(tmp_path / "once") == losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "4"], "seed is 1337, now 4"),
        (["--resume"], "there is no run"),
        (["--decay-steps", "9", "--schedule", "wsd", "--tokens", "640", "--warmup-steps", "2"], "from 1 to 8"),
    ],
)
def test_a_branch_that_would_be_another_run_is_refused(words, message, base: Path, tmp_path: Path) -> None:
    output = finish([*branch(base, tmp_path / "run"), *words], tmp_path, expect=2)
    assert message in output or "has no complete checkpoint" in output
    assert not (tmp_path / "run").exists()


def test_what_is_no_checkpoint_or_a_damaged_one_is_refused(base: Path, tmp_path: Path) -> None:
    output = finish(branch(tmp_path / "absent", tmp_path / "run"), tmp_path, expect=2)
    assert f"--branch-from {tmp_path / 'absent'} is not a checkpoint: name a folder such as" in output
    shutil.copytree(base, tmp_path / "copy")
    file = latest(tmp_path / "copy") / "rank-0-of-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    output = finish(branch(tmp_path / "copy", tmp_path / "run", **DECAY), tmp_path, expect=2)
    assert "rank-0-of-1.safetensors does not have the manifest's SHA-256; name another checkpoint" in output
    assert not (tmp_path / "run").exists()

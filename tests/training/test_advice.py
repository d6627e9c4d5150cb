"""The advice in error messages works: the options that a message names are given, and the run goes on."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainer_processes import arguments, finish, latest, losses

from phi_fast.data.manifest import Manifest
from phi_fast.prepare import main as prepare
from phi_fast.train import INTERRUPTED


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (["--global-batch-size", "6", "--micro-batch-size", "4"], "--global-batch-size 8"),
        (["--sequence-length", "300"], "--model.max-position-embeddings 300"),
        (["--sequence-length", "300"], "--sequence-length 64"),
        (["--model.vocab-size", "100"], "--model.vocab-size 8192"),
        (["--skip-spikes", "4", "--zero-step", "deepspeed"], "--zero-step fused"),
        (["--skip-norm-spikes", "4", "--zero-step", "deepspeed"], "--zero-step fused"),
        (["--ema-decay", "0.9", "--zero-step", "deepspeed"], "--zero-step fused"),
        (["--optimizer", "muon", "--zero-step", "deepspeed"], "--zero-step fused"),
        (["--decay-steps", "1"], "--schedule wsd"),
        (["--schedule", "wsd"], "--decay-steps 1"),
        (["--sample-tokens", "5", "--sample-prompt", "x ! " * 200], "--sample-tokens 0"),
        (["--mixture-stages", "1:code=1", "--mixture", "docs=1"], "--mixture docs=1,code=0"),
        (["--device", "cuda"], "--device cpu"),
        (["--micro-batch-size", "0"], "--micro-batch-size 1"),
        (["--elastic", "--no-run-dir"], "--run-dir RUN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_an_error_names(data: Path, tmp_path: Path, wrong: list[str], advice: str) -> None:
    words = arguments(data, tmp_path / "run", 2)
    if "--no-run-dir" in wrong:
        at = words.index("--run-dir")
        del words[at : at + 2]
        wrong = [word for word in wrong if word != "--no-run-dir"]
        advice = advice.replace("RUN", str(tmp_path / "run"))
    output = finish([*words, *wrong], tmp_path / "output", expect=2)
    option, _ = advice.split()
    # A message names the option as it is typed, or the field that it sets.
    assert option in output or option.removeprefix("--").replace("-", "_") in output
    assert "Traceback" not in output
    finish([*words, *wrong, *advice.split()], tmp_path / "output")


def test_a_corpus_without_validation(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    manifest = Manifest.read(copy / "docs")
    fields = json.loads((copy / "docs" / "manifest.json").read_text())
    assert "validation" in manifest.splits and "splits" in fields
    manifest.splits.pop("validation")
    manifest.write(copy / "docs")
    words = arguments(copy, tmp_path / "run", 2, val_every=1)
    output = finish(words, tmp_path / "output", expect=2)
    assert "give --val-every 0" in output
    finish([*words, "--val-every", "0"], tmp_path / "output")


def test_a_directory_with_checkpoints(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4)
    finish([*words, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    assert "already holds checkpoints; add --resume to go on" in finish(words, tmp_path / "output", expect=2)
    finish([*words, "--resume"], tmp_path / "output")
    assert len(losses(tmp_path / "run")) == 4


def test_a_directory_with_records_alone(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    words = arguments(data, run, 2)
    assert "(--elastic restarts such a run by itself)" in finish(words, tmp_path / "output", expect=2)
    finish([*words, "--elastic"], tmp_path / "output")
    assert len(losses(run)) == 2


def test_a_changed_option_of_a_run_that_goes_on(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4)
    finish([*words, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    more = ["--run-dir", str(tmp_path / "run"), "--resume", "--tokens", str(6 * 4 * 16)]
    assert "or add --allow-change" in finish(more, tmp_path / "output", expect=2)
    finish([*more, "--allow-change"], tmp_path / "output")
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_that_diverged(data: Path, tmp_path: Path, schedule: str) -> None:
    """The diagnosis's advice works, with a constant learning rate and with a schedule."""
    run = tmp_path / "run"
    options: dict[str, Any] = {"precision": "fp16", "initial_loss_scale": 256, "save_every": 1, "schedule": schedule}
    words = arguments(data, run, 8, **options)
    finish([*words, "--stop-after", "3"], tmp_path / "output", expect=INTERRUPTED)
    again = ["--run-dir", str(run), "--resume"]
    output = finish([*again, "--learning-rate", "1e6", "--allow-change"], tmp_path / "output", expect=2)
    assert output.rstrip().endswith("To try: --resume --allow-change with a lower --learning-rate")
    tried = [*again, "--allow-change", "--learning-rate", "1e-4"]
    finish([*tried, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    assert latest(run).name == "step-5"


@pytest.mark.parametrize(
    "advice",
    ["--resume --precision bf16", "--resume --min-loss-scale 0.5", "--resume --allow-change --learning-rate 1e-4"],
)
def test_a_scale_at_its_minimum(data: Path, tmp_path: Path, advice: str) -> None:
    options = {"precision": "fp16", "initial_loss_scale": 2, "loss_scale_hysteresis": 1, "save_every": 1}
    words = arguments(data, tmp_path / "run", 20, **options)
    output = finish(words, tmp_path / "output", expect=2, fault="overflow_at_steps", given=[2, 3, 4, 5])
    tried = output[output.index("To try: ") :]
    for word in shlex.split(advice):
        assert not word.startswith("--") or word in tried
    again = ["--run-dir", str(tmp_path / "run"), "--resume", *shlex.split(advice), "--stop-after", "2"]
    finish(again, tmp_path / "output", expect=INTERRUPTED)


def test_a_corpus_that_is_not_there(data: Path, tmp_path: Path) -> None:
    """The command in the message makes the corpus, with a file in place of INPUTS."""
    words = arguments(tmp_path / "data", tmp_path / "run", 2, mixture="poems=1", tokenizer=data / "tokenizer.json")
    output = " ".join(finish(words, tmp_path / "output", expect=2).split())
    command = shlex.split(output[output.index("`python -m phi_fast.prepare") :].split("`")[1])
    text = tmp_path / "poems.txt"
    text.write_text("A rose is a rose.\n\n" * 400)
    assert prepare([str(text) if word == "INPUTS" else word for word in command[3:]]) == 0
    finish([*words, "--val-every", "0"], tmp_path / "output")

"""The trainer's command: losses, resume, signals, ranks, precisions, output and error messages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.utils import clip_grad_norm_
from trainer_processes import losses, weights, without_launcher

from phi_fast.data import Mixture, TokenLoader
from phi_fast.model import Phi
from phi_fast.model.merged import to_split
from phi_fast.model.reference import ReferencePhi
from phi_fast.train import INTERRUPTED, main
from phi_fast.training.options import Options, parse
from phi_fast.training.parameters import parameter_groups
from phi_fast.training.signals import Signals

SMALL = {
    "model.hidden-size": 64,
    "model.num-attention-heads": 1,
    "model.num-hidden-layers": 2,
    "sequence-length": 32,
    "global-batch-size": 4,
    "sample-tokens": 0,
    "val-every": 0,
}
KEYS = [
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "loss_scale",
    "skipped",
    "tokens_per_s",
    "step_ms",
    "mfu",
    "data_wait_ms",
]
VALIDATION = ["val_loss", "val_losses", "val_bpb", "val_bpbs"]


def arguments(data: Path, run: Path, steps: int, **changes: Any) -> list[str]:
    """Make the command line of a small run of `steps` steps; keywords are options with _ for -."""
    options = {**SMALL, "data": data, "run-dir": run, "tokens": steps * 4 * 32}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def column(run: Path, key: str) -> list[float]:
    """Read a field of every step; the line of step 0, the validation before the first step, has no loss."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if record["step"]]


def start(words: list[str], *launcher: str, **environment: str) -> subprocess.Popen[str]:
    """Start the trainer in a separate process, with stdout and stderr in one pipe."""
    command = [*(launcher or (sys.executable, "-m", "phi_fast.train")), *words]
    pipe = subprocess.PIPE
    variables = without_launcher() | environment
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=variables)


def test_loss_falls_and_a_second_run_repeats_it_bit_for_bit(stdlib: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(arguments(stdlib, tmp_path / name, 30, val_every=15, val_rows=8, sample_tokens=5)) == 0
    first = losses(tmp_path / "a")
    assert first == losses(tmp_path / "b")
    assert len(first) == 30
    assert first[0] == pytest.approx(9.01, abs=0.1)  # ln 8192
    assert first[-1] < first[0] - 1.5
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["step", "tokens", *VALIDATION]  # before the first step
    assert (lines.pop(0)["step"], len(lines)) == (0, 30)
    assert list(lines[0]) == KEYS
    assert list(lines[14]) == [*KEYS, *VALIDATION]
    assert lines[14]["val_losses"].keys() == {"docs", "code"}
    assert lines[29]["val_loss"] < lines[14]["val_loss"]
    assert (lines[29]["step"], lines[29]["tokens"], lines[29]["mfu"]) == (30, 30 * 128, None)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "tensorboard", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stop_and_resume_give_what_never_stopping_gives(stdlib: Path, tmp_path: Path, precision: str) -> None:
    common = {"precision": precision, "loss_scale_window": 4, "initial_loss_scale": 256}
    assert main(arguments(stdlib, tmp_path / "whole", 10, **common)) == 0
    assert main(arguments(stdlib, tmp_path / "parts", 10, stop_after=3, **common)) == INTERRUPTED
    assert main(arguments(stdlib, tmp_path / "parts", 10, stop_after=4, resume=True, **common)) == INTERRUPTED
    assert main(arguments(stdlib, tmp_path / "parts", 10, resume=True, **common)) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    scales = column(tmp_path / "whole", "loss_scale")
    assert column(tmp_path / "parts", "loss_scale") == scales
    assert scales[0] == scales[-1] / 4 or precision == "fp32"  # it grew, twice
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_the_plain_loop_gives_the_same_losses(stdlib: Path, tmp_path: Path) -> None:
    """The trainer's losses of 50 steps equal those of the reference model and torch's AdamW in a plain loop."""
    words = arguments(stdlib, tmp_path / "run", 50, precision="fp32")
    options = parse(words)
    expected = plain_losses(options, start_weights(options))
    assert main(words) == 0
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)


def test_stages_of_a_mixture(stdlib: Path, tmp_path: Path) -> None:
    """With code alone from step 2 and both corpora from step 4, losses match a plain loop, also after a resume."""
    words = arguments(stdlib, tmp_path / "run", 6, precision="fp32", val_every=3, mixture="docs=1,code=0")
    words += ["--mixture-stages", "2:code=1", "4:docs=1,code=3"]
    options = parse(words)
    expected = plain_losses(options, start_weights(options))
    assert main([*words, "--stop-after", "3"]) == INTERRUPTED
    assert main(["--run-dir", str(tmp_path / "run"), "--resume"]) == 0
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, third, last = (line for line in lines if "val_losses" in line)
    assert (before["val_loss"], third["val_loss"]) == (before["val_losses"]["docs"], third["val_losses"]["code"])
    assert last["val_loss"] == pytest.approx((last["val_losses"]["docs"] + 3 * last["val_losses"]["code"]) / 4)


def start_weights(options: Options) -> dict[str, torch.Tensor]:
    """Return the trainer's initial weights under the reference model's names."""
    torch.manual_seed(options.seed)
    return to_split(Phi(options.model).state_dict())


def plain_losses(options: Options, state: dict[str, torch.Tensor]) -> list[float]:
    model = ReferencePhi(options.model)
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options), lr=options.learning_rate, betas=options.betas, eps=options.eps
    )
    mixture = Mixture.of(
        {name: (options.data / name, weight) for name, weight in options.mixture.items()},
        stages=[(step * options.global_batch_size, weights) for step, weights in options.mixture_stages],
    )
    result = []
    with TokenLoader(mixture, options.sequence_length, options.global_batch_size, seed=options.seed) as loader:
        for _ in range(options.steps):
            batch = next(loader)
            loss = model(batch.input_ids, batch.labels).loss
            loss.backward()
            clip_grad_norm_(model.parameters(), options.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
    return result


def test_accumulation_gives_the_same_losses(stdlib: Path, tmp_path: Path) -> None:
    for steps in (1, 4):
        words = arguments(stdlib, tmp_path / str(steps), 8, precision="fp32", gradient_accumulation_steps=steps)
        assert main(words) == 0
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(stdlib: Path, tmp_path: Path, precision: str) -> None:
    for name in ("fp32", precision):
        assert main(arguments(stdlib, tmp_path / name, 6, precision=name)) == 0
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), abs=0.03)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {tensor.dtype for tensor in weights(tmp_path / precision).values()} == {dtype}


def test_two_ranks_give_one_ranks_losses(stdlib: Path, tmp_path: Path) -> None:
    """A run of torchrun with two ranks is stopped and resumed by one process."""
    assert main(arguments(stdlib, tmp_path / "one", 8, precision="fp32")) == 0
    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "-m", "phi_fast.train")
    words = arguments(stdlib, tmp_path / "two", 8, precision="fp32", stop_after=4)
    process = start(words, *torchrun, TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    output, _ = process.communicate(timeout=120)
    assert not (tmp_path / "compiled").exists()  # no first start waits for a compiler
    assert "= 2 × 1 accumulated × 2 ranks" in output
    assert "stopped at step 4 of 8" in output
    assert "Warning" not in output
    assert main(arguments(stdlib, tmp_path / "two", 8, precision="fp32", resume=True)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
def test_deepspeeds_launcher_starts_it(stdlib: Path, tmp_path: Path) -> None:
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--module", "phi_fast.train")
    process = start(arguments(stdlib, tmp_path / "run", 2), *launcher, DS_ACCELERATOR="cpu")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(losses(tmp_path / "run")) == 2


def test_the_reference_model_trains_and_the_header_says_what_runs(
    stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(stdlib, tmp_path / "run", 10, implementation="reference", recompute="all", sample_tokens=5)
    assert main(words) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5
    output = capsys.readouterr().out
    assert " kernels  adam cpp\n" in output
    assert "─ sample ─" in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(stdlib: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = start(arguments(stdlib, run, 100_000))
    deadline = time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and len(losses(run)) > 3):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    done = len(losses(run))
    assert f"stopped at step {done} of 100000; to go on, start it again with --run-dir {run} --resume" in output
    assert (run / "checkpoints" / "latest").read_text() == f"step-{done}"


def test_the_second_ctrl_c_ends_it_now(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: Options, signals: Signals, console: Console) -> int:
        signals.ready()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_received
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr("phi_fast.train.train", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err.startswith("ended at once: what was not saved is lost; --resume goes on")


def test_what_a_person_sees(stdlib: Path, tmp_path: Path) -> None:
    """A pipe gets the header, plain lines, the sample and a summary, and no output of the libraries underneath."""
    process = start(arguments(stdlib, tmp_path / "run", 3, val_every=3, val_rows=2, sample_tokens=8))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    first, *lines = output.splitlines()
    assert first == "phi_fast.train: loading PyTorch and DeepSpeed"
    labels = ["recipe", "model", "data", "device", "kernels", "batch", "to go"]
    assert [line.lstrip().startswith(label) for line, label in zip(lines, labels, strict=False)] == [True] * 7
    assert lines[7].startswith("before training | val ")
    assert lines[8].startswith("step 1/3 | loss ")
    assert lines[9].startswith("step 3/3 | loss ")
    assert "─ sample ─" in lines[10]
    run = tmp_path / "run"
    end = lines[[line.startswith("    took  ") for line in lines].index(True) + 1 :]
    assert re.fullmatch(r"   speed  [\d,]+ tokens/s, median of 3 steps", end[0])
    assert re.fullmatch(r"val loss  \d\.\d{4} → \d\.\d{4} nats per token, \d\.\d{4} bits per byte", end[1])
    assert end[2] == f"   saved  {run / 'checkpoints' / 'step-3'}"
    assert end[-3:] == [
        f'  python -m phi_fast.generate --model {run} --prompt "The module"',
        f"  python -m phi_fast.report {run}",
        f"  python -m phi_fast.convert {run} {run}-hf",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": "poems=1"}, "corpus 'poems' is not at {data}/poems; make it with `python -m phi_fast.prepare"),
        ({"sequence_length": 512}, "sequence_length=512 is longer than the model's context of 256 tokens"),
        ({"micro_batch_size": 3}, "rows, but global_batch_size=4; change one of them"),
        ({"resume": True}, "has no complete checkpoint; start without --resume"),
        ({"kernels": "cuda"}, "--kernels cuda: backend 'cuda' is not one of"),
        ({"kernels": "triton"}, "Set TRITON_INTERPRET=1"),
        ({"device": "cuda"}, "--device cuda: torch sees no GPU here"),
        ({"model.vocab_size": 4096}, "but the model's vocabulary has 4096 entries"),
        ({"tokenizer": "gpt-9"}, "tokenizer 'gpt-9' is neither"),
        ({"run_dir": "/proc/nobody/run"}, "/proc/nobody/run cannot be written (No such file or directory): make room"),
        ({"sample_tokens": 5, "sample_prompt": "x ! " * 99}, "and the model's context of 256 leaves none to sample"),
    ],
)
def test_what_cannot_run_says_why_and_writes_nothing(
    stdlib: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(arguments(stdlib, tmp_path / "run", 2, **changes)) == 2
    error = capsys.readouterr().err
    assert message.format(data=stdlib) in error.replace("\n", "")
    assert error.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_half_a_launchers_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: RANK=0 is set, but not MASTER_ADDR, MASTER_PORT: a launcher ")


def test_a_run_is_not_overwritten_nor_mixed_up(
    stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments(stdlib, run, 2)) == 0
    assert main(arguments(stdlib, run, 2)) == 2
    assert "already holds checkpoints; add --resume to go on, or name another directory" in capsys.readouterr().err
    assert main(arguments(stdlib, run, 4, resume=True, **{"model.num_hidden_layers": 1, "seed": 5})) == 2
    error = capsys.readouterr().err
    assert "belongs to another run: model is" in error
    assert "seed is 1337, now 5" in error
    assert len(losses(run)) == 2


def test_runs_are_numbered_where_none_is_named(stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = arguments(stdlib, tmp_path, 1)
    del words[words.index("--run-dir") : words.index("--run-dir") + 2]
    assert [main(words), main(words)] == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_the_sample_sets_no_terminals_title(
    stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phi_fast.training.loop.sample", lambda *_: "a\x1b]0;owned\x07b [bold]c[/nothing]")
    assert main(arguments(stdlib, tmp_path / "run", 1, sample_tokens=3)) == 0
    out = capsys.readouterr().out
    assert r"a\x1b]0;owned\x07b [bold]c[/nothing]" in out
    assert "\x1b]" not in out

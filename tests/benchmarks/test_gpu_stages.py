"""What the stages of a GPU's day conclude from what they saw."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded_graphs
import torch

from benchmarks import steps
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cuda_tests, parity, place, profile, sanitizer, small_launches, step, tiles, trainer
from benchmarks.gpu.runner import NotMeasured, Session
from benchmarks.gpu.stages import stages
from phi_fast import Phi, PhiConfig
from phi_fast.kernels import tuned

ROOT = Path(command.__file__).parents[2]

MEMCHECK = """========= COMPUTE-SANITIZER
ok rotary, q
attention, causal
========= Invalid __global__ read of size 2 bytes
=========     at forward_kernel+0x1f0 in attention_forward.py:120
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """ok a
ok b
========= Error: Race reported between Write access at _forward+0x10 and Read access at _forward+0x80 [1 hazard]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def session(tmp_path: Path, *, dry: bool = True, seconds: float = 120) -> tuple[Session, dict[str, Any]]:
    found: dict[str, Any] = {}
    return Session(found.__setitem__, time.monotonic() + seconds, time.monotonic, dry, tmp_path), found


def test_what_compute_sanitizer_says_is_read() -> None:
    found = sanitizer.outcome(MEMCHECK, sanitizer.FOUND)
    assert (found["launches that ended"], found["last"]) == (1, "rotary, q")
    assert found["faults"] == "Invalid __global__ read of size 2 bytes"
    assert sanitizer.outcome(RACECHECK, sanitizer.FOUND)["faults"].startswith("Error: Race reported between Write")
    clean = sanitizer.outcome("========= COMPUTE-SANITIZER\nok a\n========= ERROR SUMMARY: 0 errors\n", 0)
    assert (clean["faults"], clean["time"]) == ("", "was enough")
    assert sanitizer.outcome("ok a\n", None)["time"] == "was up"


def test_a_tool_that_ends_badly_or_finds_what_is_not_known_is_a_fault() -> None:
    assert "status 1: Device not supported" in sanitizer.outcome("Device not supported\n", 1)["faults"]
    assert "see the log" in sanitizer.outcome("========= Something new\n", sanitizer.FOUND)["faults"]
    assert "no output" in sanitizer.outcome("", -9)["faults"]


def test_without_the_tool_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    with pytest.raises(NotMeasured, match="compute-sanitizer is not on the PATH"):
        sanitizer.check(session(tmp_path, dry=False)[0])


def test_every_kernel_is_launched_small(capsys: pytest.CaptureFixture[str]) -> None:
    small_launches.main(["--cpu"])
    lines = capsys.readouterr().out.splitlines()
    ended = [line.removeprefix("ok ") for line in lines if line.startswith("ok ")]
    assert ended == [line for line in lines if not line.startswith("ok ")]
    ops = {line.split(",")[0] for line in ended}
    assert ops == {
        *("rotary", "layer_norm", "bias_gelu", "gated_activation", "attention", "linear_cross_entropy", "adam", "model")
    }


def test_a_verdict_that_failed_fails_the_stage_and_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"out": {"ratio": 9.0}}
    wrong = {"op": "attention", "case": "c", "dtype": "float16", "backend": "triton", "status": "fail"}
    wrong |= {"detail": "out: error 1e-1", "errors": errors, "worst": "out"}
    absent = wrong | {"status": "not run", "errors": {}, "worst": None}
    crashed = wrong | {"errors": {}, "worst": None, "detail": "RuntimeError: no"}
    monkeypatch.setattr(parity.verify, "run", lambda options, console: {"verdicts": [wrong, absent, crashed]})
    given, found = session(tmp_path)
    with pytest.raises(parity.NotRight, match="6 of 6 verdicts failed"):
        parity.check(given)
    assert len(found["failures"]) == 6
    ratios = [row["error ÷ plain PyTorch's"] for row in found["error beside plain PyTorch's"]]
    assert ratios == [9.0, None] * 3


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 9.0 - step, "grad_norm": 1.5, "loss_scale": 65536.0, "lr": 1e-3} | changes


def test_a_resume_is_right_only_bit_for_bit() -> None:
    before = {n: record(n) for n in range(1, 9)}
    rows = trainer.compared(before, {n: record(n) for n in range(4, 7)}, 3)
    assert [(row["step"], row["the same, bit for bit"]) for row in rows] == [(4, True), (5, True), (6, True)]
    after = {4: record(4), 5: record(5, grad_norm=1.5000001)}
    assert [row["the same, bit for bit"] for row in trainer.compared(before, after, 3)] == [True, False, False]
    assert [row["the same, bit for bit"] for row in trainer.compared({}, after, 3)] == [False] * 3


def test_a_trainer_that_ends_by_itself_is_no_kill(tmp_path: Path) -> None:
    given, _ = session(tmp_path)
    command = [sys.executable, "-c", "print('error: no such corpus'); raise SystemExit(2)"]
    with pytest.raises(trainer.TrainerEnded, match="status 2 before step of a checkpoint: error: no such corpus"):
        trainer.until_killed(command, given, tmp_path / "run", lambda: 0)


def test_the_kill_waits_for_the_checkpoint_which_is_saved_beside_later_steps(tmp_path: Path) -> None:
    code = """
import json, sys, time
from pathlib import Path
run = Path(sys.argv[1])
(run / "checkpoints").mkdir(parents=True)
for step in range(1, 10**6):
    with (run / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": step}), file=file)
    if step == 9:
        (run / "checkpoints" / "latest").write_text("step-4")
    time.sleep(0.05)
"""
    given, _ = session(tmp_path)
    run = tmp_path / "run"
    command = [sys.executable, "-c", code, str(run)]
    found = trainer.until_killed(command, given, run, lambda: trainer.saved(run) and trainer.saved(run) + 3)
    assert max(found) >= 9
    assert trainer.saved(run) == 4
    assert set(range(1, 8)) <= set(found)


def test_the_profile_is_by_the_work_that_is_counted() -> None:
    events = [
        ("nvjet_hsh_128x256", 0.0, 400.0),
        ("forward_kernel", 500.0, 600.0),
        ("sm90_xmma_gemm_f16", 550.0, 700.0),
        ("_layer_norm_forward", 700.0, 750.0),
        ("Memcpy DtoD", 800.0, 810.0),
    ]
    rows = {row["kernel"]: row for row in profile.table(events, {"matrix products": 0.00044, "adam": 1.0})}
    assert rows["matrix products"] == {
        "kernel": "matrix products",
        "ms": 0.55,
        "launches": 2,
        "bound ms": 0.44,
        "of bound": "80%",
    }
    assert list(rows)[-1] == profile.OTHER
    assert (rows["layer_norm"]["ms"], rows["layer_norm"]["of bound"]) == (0.05, None)
    found = profile.gaps(events, 0.001)
    assert found["ms in which the GPU worked"] == 0.66  # what overlaps counts once
    assert found["ms of gaps between kernels"] == 0.15
    assert found["launches"] == 5


def test_efficiencies_are_the_bounds_over_the_times_by_kind() -> None:
    rows: list[dict[str, Any]] = [
        {"kernel": "matrix products", "ms": 10.0, "bound ms": 7.0},
        {"kernel": "layer_norm", "ms": 3.0, "bound ms": 2.0},
        {"kernel": "adam", "ms": 1.0, "bound ms": 1.0},
        {"kernel": "embedding", "ms": 5.0, "bound ms": None},
        {"kernel": profile.OTHER, "ms": 5.0, "bound ms": 1.0},
    ]
    assert profile.efficiencies(rows) == {"product": 0.7, "memory": 0.75}


def test_every_kernel_of_this_project_has_its_place_in_the_profile() -> None:
    """By the names that Triton gives them: those of their functions."""
    pytest.importorskip("triton")
    from phi_fast.kernels.triton.specimens import specimens

    launched = {specimen.launch.kernel.fn.__name__ for specimen in specimens("sm_90", torch.float16)}
    assert {"forward_kernel", "_adam", "_layer_norm_forward"} <= launched
    for name in launched:
        groups = [group for group, pattern in profile.GROUPS.items() if re.search(pattern, name)]
        assert len(groups) == 1, (name, groups)


def test_all_counted_work_has_a_bound() -> None:
    config = PhiConfig.preset("phi-1.5")
    from phi_fast.planning.work import micro_batch

    groups = {profile.group_of(kernel) for kernel in micro_batch(profile.shape(config, 4, torch.float16))}
    assert groups <= {*profile.GROUPS, profile.OTHER}
    assert {"matrix products", "attention forward", "attention backward", "layer_norm", "gelu"} <= groups


@pytest.mark.slow
def test_a_micro_batch_that_does_not_fit_is_halved() -> None:
    config = PhiConfig(512, 64, 1, 1, 32)
    tried = []

    def make(config: PhiConfig, rows: int, dtype: torch.dtype) -> Any:
        tried.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    row, size = step.largest("phi_fast", make, config, torch.float32, (16, 8, 4, 2))
    assert (tried, size, row.extra["micro-batch"]) == ([16, 8, 4], 4, 4)
    row, _ = step.largest("peer", make, config, torch.float32, (16, 8))
    assert row.seconds is None
    assert "does not fit" in row.note


def test_tests_that_fail_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("def test_right():\n    pass\n\ndef test_wrong():\n    assert 1 == 2\n")
    monkeypatch.setattr(cuda_tests, "DRY", (str(file),))
    given, found = session(tmp_path)
    with pytest.raises(cuda_tests.TestsFailed, match="1 tests failed"):
        cuda_tests.run(given)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert found["failures"][0]["test"].endswith("test_some.py::test_wrong")
    assert "assert 1 == 2" in found["failures"][0]["error"]
    assert found["all ended"] is True


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "1"], marks=pytest.mark.slow)])
def test_a_file_that_cannot_be_imported_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    """On a bare machine a package that one file imports may be missing."""
    (tmp_path / "test_right.py").write_text("def test_right():\n    pass\n")
    (tmp_path / "test_needs.py").write_text("import no_such_package\n")
    monkeypatch.setattr(cuda_tests, "DRY", (str(tmp_path), *workers))
    given, found = session(tmp_path)
    with pytest.raises(cuda_tests.TestsFailed, match="1 tests failed"):
        cuda_tests.run(given)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert "no_such_package" in found["failures"][0]["error"]


@pytest.mark.slow
def test_tests_that_cannot_be_collected_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tests, "DRY", (str(tmp_path / "test_absent.py"),))
    with pytest.raises(cuda_tests.TestsFailed, match=r"(?s)pytest ended with status 4: .*file or directory not found"):
        cuda_tests.run(session(tmp_path)[0])


def test_tiles_are_swept_where_this_version_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MODULE", "phi_fast.kernels.no_such_tuner")
    with pytest.raises(NotMeasured, match="has no phi_fast"):
        tiles.sweep(session(tmp_path)[0])
    (tmp_path / "tuner_stand_in.py").write_text(
        "import json, sys\nassert float(sys.argv[2]) < 120\njson.dump({'m': 128}, open(sys.argv[4], 'w'))\n"
    )
    monkeypatch.setattr(tiles, "MODULE", "tuner_stand_in")
    monkeypatch.setattr(tiles.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    given, found = session(tmp_path)
    tiles.sweep(given)
    assert found["table"] == {"m": 128}


def test_a_sweep_puts_its_table_as_it_grows_and_says_how_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_tuner.py").write_text(
        "import json, os, sys, time\n"
        "for n in (1, 2):\n"
        "    json.dump({'m': n}, open(sys.argv[4] + '.new', 'w'))\n"
        "    os.replace(sys.argv[4] + '.new', sys.argv[4])\n"
        "    time.sleep(1)\n"
        "sys.exit('no room on this GPU')\n"
    )
    monkeypatch.setattr(tiles, "MODULE", "failing_tuner")
    monkeypatch.setattr(tiles, "POLL", 0.1)
    monkeypatch.setattr(tiles.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    given, _ = session(tmp_path, dry=False)
    put: list[Any] = []
    growing = replace(given, put=lambda key, value: put.append(value))
    with pytest.raises(tiles.SweepFailed, match="failing_tuner ended with status 1: no room on this GPU"):
        tiles.sweep(growing)
    assert put == [{"m": 1}, {"m": 2}]


def test_a_dry_sweep_lists_what_would_be_timed(tmp_path: Path) -> None:
    given, found = session(tmp_path)
    tiles.sweep(given)
    first = found["list"].index("layer_norm.forward: dtype float16, width 2048, length 8192, variant shift")
    assert found["list"][first + 1].endswith("timed, chosen by hand")


def test_a_table_is_in_use_inside_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    with tiles.in_use(tmp_path / "tiles.json"):
        assert tuned.place("any GPU") == tmp_path / "tiles.json"
    assert tuned.VARIABLE not in os.environ


def test_the_shares_leave_time_for_every_stage_that_users_ask_for_first() -> None:
    known = {stage.name: stage for stage in stages()}
    assert list(known) == ["machine", "parity", "sanitizer", "tests", "kernels", "tiles", "step", "trainer"]
    assert sum(known[name].share for name in ("machine", "parity", "sanitizer", "tests")) <= 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget 0: expected seconds"),
        (["--only", "tiles", "speed"], "--only speed: the stages are machine, parity"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here = {"device": "CPU", "versions": {}, "gpu": None}
    monkeypatch.setattr(command, "describe", lambda dry: here)
    assert command.main([]) == 2
    assert "make gpu DRY=1" in capsys.readouterr().err


def test_a_dry_run_never_writes_among_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(command, "predicted", lambda device: {"x": 1.0})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert command.main(["--dry", "--only", "tiles"]) == 0
    written = sorted(path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file())
    assert written == [("build", "gpu-dry")] * 2
    document = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert (document["dry"], document["predicted"]) == (True, None)
    assert document["stages"]["machine"]["state"] == "not measured"


def test_a_day_is_written_among_the_results_and_its_page_in_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"device": "NVIDIA H100 80GB HBM3", "versions": {}, "gpu": {"L2 MB": 50}}
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "describe", lambda dry: here)
    monkeypatch.setattr(command, "stages", list)
    monkeypatch.setattr(command, "predicted", lambda device: {f"rotary on {device}": 1.0})
    (tmp_path / "docs").mkdir()
    assert command.main([]) == 0
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.startswith("nvidia-h100-80gb-hbm3-2")
    assert "rotary on NVIDIA H100 80GB HBM3: measured ÷ predicted not measured" in capsys.readouterr().out
    assert "rotary on NVIDIA H100" in (tmp_path / "docs" / "gpu-nvidia-h100-80gb-hbm3.md").read_text()


def test_nvidia_smi_is_asked_for_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1] == "--query-gpu=driver_version,power.limit"
        return subprocess.CompletedProcess(command, 0, "580.1, 700.00 W\n", "")

    monkeypatch.setattr(place.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(place.subprocess, "run", run)
    assert place.smi(("driver_version", "power.limit")) == {"driver_version": "580.1", "power.limit": "700.00 W"}


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path: Path) -> None:
    """Every stage but the tiles, whose tuner there may not be, ends well on this machine."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import __main__ as command; "
        "command.ROOT = Path(sys.argv[1]); sys.exit(command.main(['--dry', '--budget', '900']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(next(tmp_path.rglob("*.json")).read_text())
    states = {name: (stage["state"], stage["reason"]) for name, stage in document["stages"].items()}
    tiles = states.pop("tiles")
    assert tiles[0] in ("done", "not measured")
    assert states == dict.fromkeys(states, ("done", ""))
    rows = document["stages"]["trainer"]["results"]["steps computed twice"]
    assert [row["the same, bit for bit"] for row in rows] == [True] * 3
    assert next(tmp_path.rglob("*.md")).read_text().count("\n## ") == len(document["stages"])


def test_the_step_from_a_graph_updates_as_the_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of each on a CPU, where a replay is another run."""
    made: list[Phi] = []

    def model(config: PhiConfig) -> Phi:
        torch.manual_seed(0)
        made.append(Phi(config))
        return made[-1]

    monkeypatch.setattr(steps, "Phi", model)
    config = PhiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for run in (
        steps.ours(config, batch, torch.bfloat16),
        steps.captured(config, batch, torch.bfloat16, recorded_graphs.run_again),
    ):
        for _ in range(3):
            run()
    for ours, graph in zip(*(model.parameters() for model in made), strict=True):
        assert torch.equal(ours, graph)

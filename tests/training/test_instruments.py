"""--profile and --log-norms: what they write, and that training is the same with them and without."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_processes import arguments, finish, losses, optimizer_state, weights

from phi_fast.errors import UsageError
from phi_fast.train import INTERRUPTED
from phi_fast.training.distributed import World
from phi_fast.training.options import parse, profiled_steps
from phi_fast.training.profile import Profile
from phi_fast.training.trouble import Trouble


def norms(run: Path) -> dict[int, dict[str, dict[str, float]]]:
    return {line["step"]: line for line in map(json.loads, (run / "norms.jsonl").read_text().splitlines())}


def at(run: Path, step: int) -> dict[str, Tensor]:
    """The weights of a run in fp32 after a step, by parameter."""
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def joined(values: dict[str, float]) -> float:
    return sum(value * value for value in values.values()) ** 0.5


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 1)])
def test_norms_are_those_of_the_whole_parameters(data: Path, tmp_path: Path, ranks: int, micro: int) -> None:
    """Against the checkpoints' weights in float64, on one rank and where parameters are cut in two."""
    run = tmp_path / "run"
    words = arguments(data, run, 4, log_norms=2, save_every=1, keep_last=0, micro_batch_size=micro)
    finish(words, tmp_path, ranks=ranks)
    lines = norms(run)
    records = {record["step"]: record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert list(lines) == [2, 4]
    for step, line in lines.items():
        now, before = at(run, step), at(run, step - 1)
        for kind in ("weights", "gradients", "updates"):
            assert line[kind].keys() == now.keys()
        assert line["weights"] == pytest.approx({name: float(x.double().norm()) for name, x in now.items()}, rel=1e-6)
        moved = {name: float((x.double() - before[name].double()).norm()) for name, x in now.items()}
        assert line["updates"] == pytest.approx(moved, rel=1e-5)
        assert min(moved.values()) > 0
        assert joined(line["gradients"]) == pytest.approx(records[step]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "changes", "rel"),
    [
        (2, {}, 1e-4),
        (2, {"reduce_gradients": "micro-batch", "micro_batch_size": 1}, 1e-4),
        (1, {"precision": "fp16", "initial_loss_scale": 256}, 0.05),
    ],
    ids=["ranks", "reduced by DeepSpeed", "scaled"],
)
def test_gradients_are_those_of_one_rank_in_fp32(
    data: Path, tmp_path: Path, ranks: int, changes: dict[str, object], rel: float
) -> None:
    usual = {"log_norms": 1, "micro_batch_size": 2}
    finish(arguments(data, tmp_path / "one", 1, **usual), tmp_path)
    finish(arguments(data, tmp_path / "other", 1, **(usual | changes)), tmp_path, ranks=ranks)
    one, other = (norms(tmp_path / name)[1]["gradients"] for name in ("one", "other"))
    assert len(set(one.values())) > 5
    large = {name: norm for name, norm in one.items() if norm > 1e-3 * joined(one)}
    assert {name: other[name] for name in large} == pytest.approx(large, rel=rel)


def test_norms_of_a_resumed_run_have_each_step_once(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4, log_norms=1)
    finish([*words, "--stop-after", "2"], tmp_path, expect=INTERRUPTED)
    path = tmp_path / "run" / "norms.jsonl"
    path.write_text(path.read_text() + '{"step": 3}\n{"step": 4, "wei')  # taken after the checkpoint, then killed
    finish([*words, "--resume"], tmp_path)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert norms(tmp_path / "run")[3].keys() == {"step", "weights", "gradients", "updates"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_is_the_same_with_instruments_and_without(data: Path, tmp_path: Path, ranks: int) -> None:
    for name, more in (("with", {"log_norms": 1, "profile": "2:3"}), ("without", {})):
        output = finish(arguments(data, tmp_path / name, 4, **more), tmp_path, ranks=ranks)
        assert ("CUDA only" in output) == bool(more)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for state in (weights, optimizer_state) if ranks == 1 else (weights,):
        expected, found = state(tmp_path / "without"), state(tmp_path / "with")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {path.name for path in (tmp_path / "with").iterdir()} - {
        path.name for path in (tmp_path / "without").iterdir()
    } == {"norms.jsonl", "profile"}
    for rank in range(ranks):
        trace = tmp_path / "with" / "profile" / f"trace-rank-{rank}-steps-2-3.json.gz"
        spans = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
        assert {"step 2", "step 3", "micro-batch", "update"} <= spans
        assert not {"step 1", "step 4"} & spans
        assert "phi_fast::parallel_block" in spans or any("aten::" in str(name) for name in spans)


def test_a_trace_that_the_run_ends_in_is_written(data: Path, tmp_path: Path) -> None:
    finish(arguments(data, tmp_path / "run", 3, profile="2:9"), tmp_path)
    assert (tmp_path / "run" / "profile" / "trace-rank-0-steps-2-3.json.gz").stat().st_size > 100


def test_a_trace_that_cannot_be_written_ends_the_run_saved(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "profile").write_text("in the way")
    output = finish(arguments(data, run, 4, profile="1:2"), tmp_path, expect=2)
    assert "profile cannot be written" in output
    assert "Traceback" not in output
    assert (run / "checkpoints" / "latest").read_text() == "step-2"


def test_steps_that_are_not_taken_are_refused(data: Path, tmp_path: Path) -> None:
    output = finish(arguments(data, tmp_path / "run", 3, profile="4:5"), tmp_path, expect=2)
    assert "--profile 4:5: this start takes the steps 1 to 3" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:2", "3:2", "1:2:3", "a:b", "-1:2", "1.0:2", "1:2\n", "١:٢"])
def test_wrong_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="FROM:TO"):
        profiled_steps(text)
    with pytest.raises(UsageError, match="FROM:TO"):
        parse([f"--profile={text}"]).check()


def test_wrong_options_are_refused() -> None:
    assert list(profiled_steps("2:4")) == [2, 3, 4]
    with pytest.raises(UsageError, match="log_norms=-1"):
        parse(["--log-norms=-1"]).check()
    with pytest.raises(UsageError, match="--log-norms needs --zero-step fused"):
        parse(["--log-norms=1", "--zero-step=deepspeed"]).check()


@pytest.mark.filterwarnings("ignore:.*CUDA.*:UserWarning")
def test_on_cuda_the_memory_is_recorded_for_the_traced_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that have the signatures of torch's own functions."""
    calls = {}
    for module, name in (
        (torch.cuda.memory, "_record_memory_history"),
        (torch.cuda.memory, "_dump_snapshot"),
        (torch.cuda.nvtx, "range"),
        (torch.cuda, "synchronize"),
    ):
        calls[name] = create_autospec(getattr(module, name))
        monkeypatch.setattr(module, name, calls[name])
    calls["range"].side_effect = lambda name: nullcontext()
    world = World(1, 2, 0, torch.device("cuda", 0))
    traced = Profile(tmp_path / "profile", range(2, 4), world, Trouble(world))
    for step in range(1, 5):
        with traced.step(step), traced.span("update"):
            torch.ones(3).sum()
    assert [call.kwargs.get("enabled", "all") for call in calls["_record_memory_history"].mock_calls] == ["all", None]
    calls["_dump_snapshot"].assert_called_once_with(str(tmp_path / "profile" / "memory-rank-1-steps-2-3.pickle"))
    assert [call.args[0] for call in calls["range"].mock_calls] == ["step 2", "update", "step 3", "update"]
    assert (tmp_path / "profile" / "trace-rank-1-steps-2-3.json.gz").stat().st_size > 100

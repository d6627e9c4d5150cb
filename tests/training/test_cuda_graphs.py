"""--cuda-graphs: replays train like hooks, read inputs and the loss scale from the device, and say what they refuse."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recorded_graphs import WARM_UP, record, run_again
from torch import Tensor
from trainer_processes import arguments, finish, losses, optimizer_state, weights

from phi_fast import PhiConfig
from phi_fast.data import Batch
from phi_fast.errors import MachineError, UsageError
from phi_fast.model.reference import ReferencePhi
from phi_fast.precision import DTYPES
from phi_fast.recipes import RECIPES
from phi_fast.train import main
from phi_fast.training import cuda_graphs
from phi_fast.training.distributed import World, join
from phi_fast.training.options import Options, parse
from phi_fast.training.zero import Zero2

RECIPE = RECIPES["tiny"].replace(
    model=PhiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1),
    loss_scale_window=2,
    initial_loss_scale=2.0**10,
)


@pytest.fixture(scope="module")
def world() -> World:
    return join("cpu")


def batches(count: int, rows: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(64, (rows, 17), generator=generator) for _ in range(count)]
    nothing = torch.zeros(rows, dtype=torch.int32)
    return [Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), range(rows), nothing) for x in ids]


def zero2(world: World, precision: str = "fp32", accumulation: int = 1, capture: object = None) -> Zero2:
    torch.manual_seed(0)
    model = ReferencePhi(RECIPE.model).to(DTYPES[precision])
    options = {"precision": precision, "micro_batch_size": 2, "accumulation": accumulation, "capture": capture}
    return Zero2(model, RECIPE, world, **options)


def train(zero: Zero2, steps: int) -> tuple[list, dict[str, Tensor]]:
    """Outcomes of the steps, and what is left of the weights and the optimizer."""
    outcomes, data = [], iter(batches(steps * zero.accumulation))
    for step in range(steps):
        for _ in range(zero.accumulation):
            zero.micro_batch(next(data))
        outcomes.append(zero.step(1e-3 * (step + 1)))
    return outcomes, {**zero.partitions(), **dict(zero.model.named_parameters())}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replays_train_like_eager_steps_bit_for_bit(world: World, precision: str, accumulation: int) -> None:
    """In fp16 the loss scale doubles every other step, which replays must see. They run none of the model's Python."""
    expected, state = train(zero2(world, precision, accumulation), 6)
    zero = zero2(world, precision, accumulation, record)
    calls: list[int] = []
    zero.model.register_forward_pre_hook(lambda *_: calls.append(1))
    actual, ours = train(zero, 6)
    assert actual == expected
    assert len({outcome.loss_scale for outcome in actual}) == (3 if precision == "fp16" else 1)
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
    assert len(calls) == WARM_UP + 1


def test_an_overflow_in_a_replay_skips_its_step_only(world: World) -> None:
    zero = zero2(world, "fp16", 2, record)
    data, skipped = iter(batches(8)), []
    for step in range(4):
        if step == 1:
            zero.zero.loss_scaler.cur_scale = 2.0**40
        for _ in range(2):
            zero.micro_batch(next(data))
        skipped.append(zero.step(1e-3).skipped)
        if step == 1:
            zero.zero.loss_scaler.cur_scale = 2.0**10
    assert skipped == [False, True, False, False]


def test_batches_are_copied_to_the_same_memory(world: World) -> None:
    """A batch's own memory goes back to the loader, so a replay must not read it."""
    zero, seen = zero2(world, capture=run_again), []
    zero.model.register_forward_pre_hook(lambda _, given: seen.append([(x.data_ptr(), x.clone()) for x in given]))
    data = batches(3)
    for batch in data:
        zero.micro_batch(batch)
        zero.step(1e-3)
    replays = seen[WARM_UP:]
    assert len({tuple(address for address, _ in given) for given in seen}) == 1
    assert not {address for address, _ in seen[0]} & {batch.input_ids.data_ptr() for batch in data}
    for batch, ((_, ids), (_, labels)) in zip(data, replays, strict=True):
        assert torch.equal(ids, batch.input_ids) and torch.equal(labels, batch.labels)


def test_another_shape_is_refused(world: World) -> None:
    zero = zero2(world, capture=record)
    zero.micro_batch(batches(1)[0])
    zero.step(1e-3)
    with pytest.raises(ValueError, match=r"micro-batch of \(3, 16\) tokens: the captured CUDA graph takes \(2, 16\)"):
        zero.micro_batch(batches(1, rows=3)[0])


def test_deepspeeds_own_step_has_no_graph(world: World) -> None:
    with pytest.raises(ValueError, match="capture needs fused=True"):
        Zero2(
            ReferencePhi(RECIPE.model),
            RECIPE,
            world,
            precision="fp32",
            micro_batch_size=2,
            accumulation=1,
            fused=False,
            capture=record,
        )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("capture", "model"), [("record", ("reference", "reference")), ("run_again", ("phi", "auto"))], ids=["torch", "phi"]
)
def test_the_trainer_with_and_without(
    data: Path, tmp_path: Path, capture: str, model: tuple[str, str], accumulation: int
) -> None:
    options = {"implementation": model[0], "kernels": model[1], "gradient_accumulation_steps": accumulation}
    for run in ("with", "without"):
        words = arguments(data, tmp_path / run, 6, val_every=3, val_rows=4, **options)
        if run == "without":
            finish(words, tmp_path / run / "output")
        else:
            output = finish(
                [*words, "--cuda-graphs"], tmp_path / run / "output", fault="graphs_on_a_cpu", given=[capture]
            )
            assert "fused step, CUDA graphs" in output
    runs = tmp_path / "with", tmp_path / "without"
    assert losses(runs[0]) == losses(runs[1])
    for state in (weights, optimizer_state):
        ours, expected = state(runs[0]), state(runs[1])
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_run_on_a_cpu_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(data, tmp_path / "run", 2), "--cuda-graphs"]) == 2
    assert "--cuda-graphs: this run trains on the CPU, which has no CUDA graphs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zero-step", "deepspeed"], "--cuda-graphs needs --zero-step fused"),
        (["--document-isolation"], "--cuda-graphs and --document-isolation: a graph has fixed shapes"),
    ],
)
def test_options_without_fixed_gradients_or_shapes_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--cuda-graphs", *words]).check()


@pytest.mark.parametrize(
    ("reduce", "ranks", "accumulation", "gigabytes", "allowed"),
    [
        ("micro-batch", 2, 2, 80, False),
        ("micro-batch", 2, 1, 80, True),
        ("micro-batch", 1, 2, 80, True),
        ("auto", 2, 2, 40, False),  # 5.7 GB of sums are more than a tenth
        ("auto", 2, 2, 80, True),
        ("step", 2, 2, 40, True),
    ],
)
def test_reductions_of_each_micro_batch_are_refused(
    monkeypatch: pytest.MonkeyPatch, reduce: str, ranks: int, accumulation: int, gigabytes: int, allowed: bool
) -> None:
    memory = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    world = World(0, ranks, 0, torch.device("cuda"))
    options = Options(model=PhiConfig.preset("phi-1.5"), reduce_gradients=reduce, cuda_graphs=True)  # type: ignore[arg-type]
    if allowed:
        cuda_graphs.check(options, world, accumulation)
        return
    with pytest.raises(UsageError, match=f"--reduce-gradients {reduce} reduces them after each of 2 micro-batches"):
        cuda_graphs.check(options, world, accumulation)


class Device:
    """The calls of torch.cuda that a capture makes, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[object] = []
        streams = {name: self.stream(name) for name in ("current", "side")}
        graph = SimpleNamespace(replay=lambda: self.calls.append("replay"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams["current"])
        monkeypatch.setattr(torch.cuda, "Stream", lambda: streams["side"])
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.inside(stream.name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda _, capture_error_mode: self.inside(capture_error_mode))

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.calls.append((name, "after", other.name)))

    @contextmanager
    def inside(self, what: str):
        self.calls.append(f"in {what}")
        yield
        self.calls.append(f"out of {what}")


def test_a_capture_warms_up_beside_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    cuda_graphs.capture(lambda: device.calls.append("run"))()
    assert device.calls == [
        *(("side", "after", "current"), "in side", *["run"] * cuda_graphs.WARM_UP, "out of side"),
        *(("current", "after", "side"), "in thread_local", "run", "out of thread_local", "replay"),
    ]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            RuntimeError("not permitted when stream is capturing\nCompile with"),
            MachineError,
            r"captured here \(not perm",
        ),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
    ],
)
def test_what_a_graph_cannot_hold_is_told(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], message: str
) -> None:
    Device(monkeypatch)
    runs: list[int] = []

    def run() -> None:
        runs.append(1)
        if len(runs) > cuda_graphs.WARM_UP:
            raise raised

    with pytest.raises(expected, match=message):
        cuda_graphs.capture(run)

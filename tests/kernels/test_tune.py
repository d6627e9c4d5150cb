"""`python -m phi_fast.kernels.tune`, with a clock, a timer and a compiler that the tests control: no GPU is timed."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.kernel_cache import meta_as_a_gpu
from phi_fast import Phi, PhiConfig
from phi_fast.kernels import FusedAdam, backend, fuse_rotary, tune, tuned, use
from phi_fast.kernels.adam import grad_norm_squared
from phi_fast.kernels.triton import attention_tiles, tiles
from phi_fast.kernels.triton.common import Launch, recording
from phi_fast.kernels.triton.compiled import ARCHITECTURES, Architecture, Compiled
from phi_fast.kernels.triton.tiles import session
from phi_fast.kernels.tuning import candidates, race, rivals, subjects, sweep
from phi_fast.kernels.tuning.shape import Shape

Captured = pytest.CaptureFixture[str]
META, GPU = torch.device("meta"), "NVIDIA Test"
GOOD = Compiled(32, 0, 1024, 1.0, "warps", (), {"wgmma": 4}, True)


@dataclass
class Bench:
    """A GPU, a compiler and a clock: each kernel takes `seconds` of it, and every call moves the clock."""

    seconds: Callable[[Launch], float] = lambda launch: 1e-3
    compiled: Callable[[Launch], Compiled] = lambda launch: GOOD
    compiling: float = 0.01
    now: float = 0.0
    timed: list[Launch] = field(default_factory=list)

    def tools(self, **other: Any) -> sweep.Tools:
        def measure(launch: Any) -> float:
            assert hash(launch) is not None, "the timer of a GPU keeps a graph for each"
            self.timed.append(launch)
            taken = self.seconds(launch)
            self.now += 10 * taken
            return taken

        def compile_one(launch: Launch, architecture: Architecture) -> Compiled:
            self.now += self.compiling
            return self.compiled(launch)

        given = {"clock": lambda: self.now, "on_stream": lambda _: recording("sm_90"), **other}
        return sweep.Tools("sm_90", compile_one, lambda: measure, **given)


def test_a_gated_model_has_its_own_activation() -> None:
    for shape, own, other in (
        (Shape(), "bias_gelu", "gated_activation"),
        (Shape(gated=True), "gated_activation", "bias_gelu"),
    ):
        ops = [call.op for call in subjects.every(shape, [torch.float16], META, ())]
        assert own in ops and other not in ops
    [call] = subjects.every(Shape(gated=True), [torch.float16], META, ("gated_activation",))
    with recording("sm_90"):
        found = candidates.choices(call.prepare(), "sm_90")
    assert [choice.tunable.name for choice in found] == ["gated_activation.forward", "gated_activation.backward"]


def run_sweep(
    bench: Bench, seconds: float, ops: tuple[str, ...] = ("layer_norm",), **tools: Any
) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    calls = subjects.every(Shape(), [torch.float16], META, ops)
    sweep.sweep(calls, bench.tools(**tools), seconds, kept.append, lambda line: None)
    return kept


# What is tuned


@pytest.mark.parametrize("recompute", ["none", "norm_gelu", "all"])
@pytest.mark.parametrize("inside", [False, True], ids=["RoPE before", "RoPE inside"])
def test_every_launch_of_a_step_is_among_those_tuned(inside: bool, recompute: Any) -> None:
    """Otherwise a user's table would hold cases that the step never asks for."""
    with meta_as_a_gpu(), use("triton"), fuse_rotary(inside), recording("sm_90"), META, session() as step:
        model = Phi(PhiConfig.preset("phi-1.5").replace(num_hidden_layers=1), recompute=recompute).half()
        ids = torch.zeros(4, 2048, dtype=torch.int64)
        model(ids, ids).loss.backward()
        grad_norm_squared([p.grad for p in model.parameters() if p.grad is not None])
        FusedAdam(model.parameters(), lr=1e-4, master_weights=True).step()
    found = set[Any]()
    for call in subjects.every(Shape(rotary_inside=inside), [torch.float16], META, ()):
        with recording("sm_90"):
            run = call.prepare()
        found |= {(choice.tunable.name, choice.case) for choice in candidates.choices(run, "sm_90")}
    assert {(choice.tunable.name, choice.case) for choice in step.choices} <= found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(documents=8), {"documents": True, "length": 8192}),
        (Shape(causal=False), {"mask": "full"}),
        (Shape(heads=16, key_heads=4), {"head_dim": 128, "group": 4}),
        (Shape(rows=1, sequence=3000), {"length": 4096}),
        (Shape(rotary_inside=True), {"rotation": 32}),
    ],
    ids=str,
)
def test_attention_is_tuned_at_the_given_shape(shape: Shape, expected: dict[str, Any]) -> None:
    [call] = subjects.every(shape, [torch.bfloat16], META, ("attention",))
    with recording("sm_90"):
        run = call.prepare()
    for choice in candidates.choices(run, "sm_90"):
        case = choice.case._asdict()
        assert case == {**case, **expected, "dtype": "bfloat16"}


# The race


def seconds_of(times: dict[str, Iterator[float]], order: list[str]) -> Callable[[Callable[[], object]], float]:
    def measure(run: Callable[[], object]) -> float:
        name = run()
        order.append(str(name))
        return next(times[str(name)])

    return measure


def steady(value: float) -> Iterator[float]:
    yield 9.0  # the first, which is dropped
    while True:
        yield value


def raced(times: dict[str, Iterator[float]], **options: Any) -> tuple[dict[str, list[float]], list[str], list[str]]:
    order: list[str] = []
    left: list[str] = []
    contenders = {name: (lambda name=name: name) for name in times}
    given = {"until": lambda: False, "refused": lambda key, error: left.append(key), **options}
    return race.race(contenders, seconds_of(times, order), **given), order, left


def test_contenders_are_timed_in_turn_and_their_first_figure_is_dropped() -> None:
    seconds, order, _ = raced({"a": steady(1.0), "b": steady(1.1)})
    assert order == ["a", "b"] * (race.ROUNDS + 1)
    assert seconds == {"a": [1.0] * race.ROUNDS, "b": [1.1] * race.ROUNDS}


def test_one_that_is_half_as_slow_again_leaves_and_the_yardstick_stays() -> None:
    seconds, order, _ = raced({"by hand": steady(3.0), "near": steady(1.4), "far": steady(1.6), "best": steady(1.0)})
    assert Counter(order) == {"by hand": 16, "near": 16, "far": 2, "best": 16}
    assert race.winner(seconds) == "best"


def test_a_tie_keeps_the_first() -> None:
    seconds, *_ = raced({"by hand": steady(1.0), "other": steady(0.985)})
    assert race.winner(seconds) == "by hand"
    seconds, *_ = raced({"by hand": steady(1.0), "other": steady(0.975)})
    assert race.winner(seconds) == "other"


def test_a_race_whose_time_is_up_has_a_figure_of_each() -> None:
    seconds, *_ = raced({"a": steady(1.0), "b": steady(1.2), "c": steady(0.9)}, until=lambda: True)
    assert seconds == {"a": [1.0], "b": [1.2], "c": [0.9]}


def refusing() -> Iterator[float]:
    raise OutOfResources(200000, 100000, "shared memory")
    yield 0.0


def test_a_tile_that_the_gpu_has_no_room_for_leaves() -> None:
    seconds, _, left = raced({"a": steady(1.0), "b": refusing()}, refusals=(OutOfResources,))
    assert seconds.keys() == {"a"} and left == ["b"]
    with pytest.raises(OutOfResources):
        raced({"a": refusing(), "b": steady(1.0)}, refusals=(OutOfResources,))


# The compiler's verdict


@pytest.mark.parametrize(
    ("compiled", "why"),
    [
        (replace(GOOD, spilled=8), "spills 8 bytes per thread"),
        (replace(GOOD, serialised=True), "waits for each wgmma before the next (ptxas C7515)"),
        (replace(GOOD, shared=300000), "wants 300000 bytes of shared memory, a block may have 232448"),
        (replace(GOOD, tensor_core={}), "multiplies matrices without tensor-core instructions"),
        (GOOD, ""),
    ],
)
def test_what_the_compiler_says_of_a_candidate(compiled: Compiled, why: str) -> None:
    assert candidates.fault(compiled, ARCHITECTURES["sm_90"]) == why


def test_what_spills_or_does_not_compile_is_never_timed() -> None:
    def compiled(launch: Launch) -> Compiled:
        if launch.num_warps == 1:
            raise RuntimeError("PassManager::run failed\nsecond line")
        return replace(GOOD, spilled=16 * (launch.num_warps == 2), serialised=launch.num_warps == 8)

    bench = Bench(compiled=compiled)
    kept = run_sweep(bench, 1000.0)
    by_hand = {("layer_norm.forward", 4), ("layer_norm.backward", 8)}
    warps = {(entry["kernel"], launch.num_warps) for entry in kept for launch in bench.timed}
    assert {launch.num_warps for launch in bench.timed} == {4, 8, 16}, warps - by_hand
    forward = next(entry for entry in kept if entry["kernel"] == "layer_norm.forward")
    assert forward["timed"] == 2 and forward["not_compiled"] == 0
    assert forward["dropped"] == {
        "does not compile": 1,
        "spills bytes per thread": 1,
        "waits for each wgmma before the next (ptxas C7515)": 1,
    }


# The sweep


def by_warps(best: int) -> Callable[[Launch], float]:
    """The nearer to `best` warps, the faster."""
    return lambda launch: 1e-3 * (1 + abs(launch.num_warps.bit_length() - best.bit_length()))


def test_the_fastest_tile_is_found_and_a_tie_keeps_the_one_by_hand() -> None:
    kept = run_sweep(Bench(seconds=by_warps(16)), 1000.0)
    assert {entry["tile"]["warps"] for entry in kept} == {16}
    assert all(entry["milliseconds"] == 1 and entry["by_hand_milliseconds"] > 1 for entry in kept)
    for entry in run_sweep(Bench(), 1000.0):
        assert entry["tile"] == entry["by_hand"]


def weight(launch: Launch) -> float:
    """Adam takes 1 ms, once a step; attention's kernels 1, 2 and 3 ms in each of 24 layers."""
    return {"forward_kernel": 1e-3, "dq_kernel": 2e-3, "dkv_kernel": 3e-3}.get(launch.kernel.__name__, 1e-3)


def test_the_budget_goes_by_the_share_of_a_step() -> None:
    bench = Bench(seconds=weight, compiling=1.0)
    kept = run_sweep(bench, 200.0, ("attention", "adam"), most=1000)
    assert [entry["kernel"] for entry in kept[:3]] == ["attention.dkv", "attention.dq", "attention.forward"]
    timed = {entry["kernel"]: entry["timed"] for entry in kept}
    assert timed["attention.dkv"] > timed["attention.dq"] > timed["attention.forward"] >= timed["adam.step"] >= 1
    assert timed["attention.dkv"] == pytest.approx(0.6 * 200 * 3 / 6, abs=6), "a second each, 60% of its share"
    assert 150 < bench.now < 230


def test_a_budget_that_is_spent_leaves_the_rest_as_it_was() -> None:
    told: list[str] = []
    kept: list[dict[str, Any]] = []
    bench = Bench(seconds=weight, compiling=30.0)
    calls = subjects.every(Shape(), [torch.float16], META, ())
    sweep.sweep(calls, bench.tools(), 60.0, kept.append, told.append)
    assert kept[0]["kernel"] == "attention.dkv"
    assert told[-1].startswith("the time was up: ") and told[-1].endswith("keep the tile that was chosen by hand")


# Attention's other back ends


class Rival:
    """A library's attention, which takes `seconds` where `bench` times it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def forward(self, q: Any, k: Any, v: Any, options: Any, *, out: Any) -> tuple[Any, Any]:
        if self.name == "cudnn":
            raise ValueError("cudnn takes no documents\nsecond line")
        return out, None

    def backward(self, *arguments: Any, **gradients: Any) -> None: ...


RIVALS = {"triton": 2.0, "sdpa": 1.0, "flash-attn": 1.5, "flash-attn-3": 4.0}
"""ms; cuDNN refuses the shape, and flash-attn-4 is not installed."""


def compared(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
    def module(name: str, op: str) -> Any:
        if name == "flash-attn-4":
            raise backend.BackendUnavailable("attention: FlashAttention-4 cannot be imported")
        return Rival(name)

    monkeypatch.setattr(rivals.backend, "module", module)
    told: list[str] = []
    bench = Bench()
    make = subjects.Make(Shape(), torch.float16, META)

    def measure(run: Any) -> float:
        cells = inspect.getclosurevars(run).nonlocals
        bench.now += 1
        return 1e-3 * times[cells["kernels"].name]

    tools = replace(bench.tools(), timer=lambda: measure)
    return rivals.compare(make, tools, [], 1e9, told.append), told


def test_the_fastest_back_end_that_repeats_its_bits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    result, told = compared(monkeypatch, RIVALS)
    assert result["backend"] == "flash-attn", "torch's flash attention is faster, and may add in any order"
    assert result["milliseconds"] == {"triton": 2.0, "sdpa": 1.0, "flash-attn": 1.5, "flash-attn-3": 4.0}
    assert result["case"] == {"head_dim": 64, "dtype": "float16", "rotation": 0, "mask": "causal"} | {
        "documents": False, "group": 1, "length": 2048,
    }  # fmt: skip
    assert told[:2] == [
        "attention by cudnn is not timed: cudnn takes no documents",
        "attention by flash-attn-4 is not timed: attention: FlashAttention-4 cannot be imported",
    ]


def test_a_back_end_that_is_no_faster_leaves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = compared(monkeypatch, RIVALS | {"flash-attn": 1.97, "sdpa": 3.0})
    assert result["backend"] == "triton"


def test_this_projects_kernels_race_with_the_tiles_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention_tiles.Case(64, "float16", 0, "causal", False, 1, 2048)
    tile = attention_tiles.Tile(64, 32, 4, 1)
    entry = {"kernel": "attention.dq", "case": case._asdict(), "tile": tile._asdict()}
    seen: list[Any] = []

    def measure(run: Callable[[], object]) -> float:
        with recording("sm_90") as launches:
            run()
        seen.extend(launch.constants["N"] for launch in launches if launch.kernel.__name__ == "dq_kernel")
        return 1e-3

    monkeypatch.setattr(rivals, "NAMES", ("triton",))
    tools = replace(Bench().tools(), timer=lambda: measure)
    rivals.compare(subjects.Make(Shape(), torch.float16, META), tools, [entry], 1e9, lambda line: None)
    assert set(seen) == {32}


# The command


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU that has a name, and a cache folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tiles.forget()
    yield tmp_path / "phi_fast" / "tuned" / "NVIDIA-Test.json"
    tiles.forget()


def tune_with(bench: Bench, **options: Any) -> list[str]:
    told: list[str] = []
    given = tune.Options(**{"ops": ("layer_norm",), "seconds": 1000.0, **options})
    tune.tune(given, bench.tools(), GPU, META, told.append)
    return told


def layer_norm_tile(rows: int = 8192) -> Any:
    layer_norm = pytest.importorskip("phi_fast.kernels.triton.layer_norm")
    case = tiles.RowCase("float16", 2048, rows, "shift")
    return layer_norm.FORWARD.tile(torch.device("cuda", 0), layer_norm.ForwardTile(4), lambda: case)


def test_what_was_measured_is_used_by_the_next_process(gpu: Path) -> None:
    assert layer_norm_tile().warps == 4
    told = tune_with(Bench(seconds=by_warps(16)))
    assert told[-1] == f"4 tiles are in {gpu}" and told[-2] == "not timed: none"
    tiles.forget()  # as a new process
    assert layer_norm_tile().warps == 16
    assert layer_norm_tile(4096).warps == 4, "not measured"
    tune_with(Bench(seconds=by_warps(8)), rows=2)
    tiles.forget()
    assert (layer_norm_tile().warps, layer_norm_tile(4096).warps) == (16, 8), "a table goes on"
    tune_with(Bench(seconds=by_warps(8)))
    tiles.forget()
    assert layer_norm_tile().warps == 8, "and what is measured again replaces what was"


def test_attentions_back_ends_are_in_the_table(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "NAMES", ("triton",))
    for _ in range(2):
        tune_with(Bench(), ops=("attention",), dtypes=("float16", "bfloat16"), seconds=100.0)
    document = json.loads(gpu.read_text())
    assert [(entry["case"]["dtype"], entry["backend"]) for entry in document["backends"]] == [
        ("float16", "triton"),
        ("bfloat16", "triton"),
    ]
    assert Counter(entry["kernel"] for entry in document["tiles"]) == Counter(
        {"attention.forward": 2, "attention.dq": 2, "attention.dkv": 2}
    )


def test_a_table_of_another_triton_begins_anew(gpu: Path) -> None:
    tune_with(Bench())
    document = json.loads(gpu.read_text())
    gpu.write_text(json.dumps({**document, "triton": "3.4.0"}))
    tune_with(Bench(), rows=2)
    entries = json.loads(gpu.read_text())["tiles"]
    assert {entry["case"]["length"] for entry in entries} == {4096}


def test_a_stop_keeps_what_is_done(gpu: Path, tmp_path: Path) -> None:
    table = tmp_path / "here.json"
    bench = Bench(seconds=by_warps(16))

    def stopped(launch: Launch) -> float:
        if len(bench.timed) > 100:
            raise KeyboardInterrupt
        return by_warps(16)(launch)

    bench.seconds = stopped
    with pytest.raises(KeyboardInterrupt):
        tune_with(bench, json=table)
    entries = tuned.read(table)["tiles"]
    assert 1 <= len(entries) < 4
    assert not gpu.exists()


def test_a_file_that_cannot_be_written_is_known_before_anything_is_timed(gpu: Path, tmp_path: Path) -> None:
    bench = Bench()
    (tmp_path / "file").write_text("")
    with pytest.raises(tune.CannotTune, match=r"here\.json cannot be (read|written) .*: name another file with --json"):
        tune_with(bench, json=tmp_path / "file" / "here.json")
    assert bench.timed == []


def test_no_folder_for_the_table(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, "")
    with pytest.raises(tune.CannotTune, match="name a file with --json"):
        tune_with(Bench())


def test_without_a_gpu_only_a_list_can_be_had(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    monkeypatch.setattr("phi_fast.kernels.triton.compiled.compile_launch", lambda launch, architecture: GOOD)
    assert tune.main(["--list", "--ops", "layer_norm", "--most", "2"]) == 0
    printed = capsys.readouterr().out
    assert "layer_norm.forward: dtype float16, width 2048, length 8192, variant shift" in printed
    assert "  warps 4: timed, chosen by hand\n  warps 2: timed\n" in printed


def test_the_list_says_why_a_tile_is_not_timed(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "phi_fast.kernels.triton.compiled.compile_launch",
        lambda launch, architecture: replace(GOOD, spilled=8 * (launch.num_warps == 2)),
    )
    tune.show(tune.Options(ops=("layer_norm",), most=2))
    assert "  warps 2: not timed: spills 8 bytes per thread\n" in capsys.readouterr().out
    monkeypatch.setattr(
        "phi_fast.kernels.triton.compiled.compile_launch", lambda launch, architecture: replace(GOOD, spilled=8)
    )
    tune.show(tune.Options(ops=("layer_norm",), most=1))
    printed = capsys.readouterr().out
    assert "  warps 4: timed, chosen by hand, though it spills 8 bytes per thread\n" in printed


def test_a_sweep_compiles_at_most_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(tune, "_gpu", lambda most: asked.append(most) or (Bench().tools(), GPU))
    monkeypatch.setattr(tune, "tune", lambda *_: None)
    assert tune.main(["--most", "8"]) == 0
    assert asked == [8]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "give fewer --rows"),
        (KeyboardInterrupt(), 130, "stopped: the table keeps what was measured"),
    ],
    ids=["memory", "Ctrl-C"],
)
def test_how_a_sweep_may_end(
    error: BaseException, status: int, message: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(tune, "_gpu", lambda most: (Bench().tools(), GPU))
    monkeypatch.setattr(tune, "tune", end)
    assert tune.main([]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds 0: expected a positive number"),
        (["--seconds", "nan"], "--seconds nan: expected a positive number"),
        (["--most", "0"], "--most 0: expected at least 1"),
        (["--rows", "0"], "--rows 0: expected a positive number"),
        (["--key-heads", "-1"], "--key-heads -1: expected a positive number"),
        (["--heads", "3"], "--hidden-size 2048 is not a multiple of --heads 3"),
        (["--key-heads", "5"], "--heads 32 is not a multiple of --key-heads 5"),
        (["--rotary-dim", "65"], "--rotary-dim 65: expected an even number of up to 64"),
        (["--documents", "9000"], "--documents 9000: expected at most one per token, 8192"),
        (
            ["--list", "--heads", "16", "--hidden-size", "1152"],
            "attention in Triton takes head_dim 64, 80, 96, 128, not 72",
        ),
    ],
)
def test_wrong_values(words: list[str], message: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    assert tune.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_interpreter_has_nothing_to_tune(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "interpreting", lambda: True)
    assert tune.main(["--list"]) == 2
    assert "TRITON_INTERPRET=1 replaces the compiler" in capsys.readouterr().err

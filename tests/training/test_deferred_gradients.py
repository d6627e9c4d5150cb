"""Two ranks reduce gradients per micro-batch or once per step, by DeepSpeed or directly: the updates are the same, and
the bytes sent are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import trainer_processes
from recorded_graphs import run_again
from torch import Tensor, nn

from phi_fast import PhiConfig
from phi_fast.data import Batch
from phi_fast.model.output import Output
from phi_fast.model.reference import ReferencePhi
from phi_fast.precision import DTYPES
from phi_fast.recipes import RECIPES
from phi_fast.training import gradients
from phi_fast.training import zero as zero_module
from phi_fast.training.deepspeed_config import deepspeed_config
from phi_fast.training.deferred_gradients import reduces_once
from phi_fast.training.distributed import World, join, leave
from phi_fast.training.options import Options
from phi_fast.training.parameters import parameter_groups
from phi_fast.training.zero import Zero2

CONFIG = PhiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
RECIPE = RECIPES["tiny"].replace(model=CONFIG, gradient_clipping=0.5, initial_loss_scale=2.0**10)
MICRO_BATCHES, STEPS = 3, 4
WAYS = {
    "directly": (True, True, None),
    "once": (False, True, None),
    "each micro-batch": (False, False, None),
    "directly, graph": (True, True, run_again),
    "once, graph": (False, True, run_again),
}
"""Way -> (do the ranks exchange partitions directly, do they reduce once per step, what captures a CUDA graph)."""


class Late(nn.Module):
    """The model, and a weight that only the first micro-batch of each step uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.phi = ReferencePhi(CONFIG)
        self.extra = nn.Parameter(torch.ones(5))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        loss = self.phi(input_ids, labels).loss
        return Output(loss + (self.extra.float().square().sum() if input_ids[0, 0] == 1 else 0.0), None)


def rows(step: int, rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    ids = torch.randint(2, 64, (2, 17), generator=generator)
    ids[0, 0] = 1 if micro_batch == 0 else 0
    return ids[:, :-1], ids[:, 1:]


def train(rank: int, folder: str) -> None:
    """Train each way in each precision, on this rank of two; rank 0 keeps the weights and what was sent."""
    world = join("cpu")
    sent = {"elements": 0}
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "isend"):
        collective = getattr(dist, name)

        def spy(tensor, *args, collective=collective, name=name, **kwargs):
            # Each of two ranks sends as many elements as it all-reduces, half as many if it reduces them to one rank.
            sent["elements"] += tensor.numel() * (1 if name in ("all_reduce", "isend") else 0.5)
            return collective(tensor, *args, **kwargs)

        setattr(dist, name, spy)
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        for way, (directly, once, capture) in WAYS.items():
            for module in (gradients, zero_module):
                module.sends_directly = lambda world, directly=directly: directly
            model = Late().to(DTYPES[precision])
            options = {"precision": precision, "micro_batch_size": 2, "accumulation": MICRO_BATCHES}
            zero = Zero2(model, RECIPE, world, reduce_once=once, capture=capture, **options)
            sent["elements"] = 0
            outcomes = []
            for step in range(STEPS):
                for micro_batch in range(MICRO_BATCHES):
                    zero.micro_batch(Batch(*rows(step, rank, micro_batch), range(2), torch.zeros(2, dtype=torch.int32)))
                outcomes.append(zero.step(1e-2))
            found[precision, way] = (
                {name: p.detach().clone() for name, p in model.named_parameters()},
                [outcome.grad_norm for outcome in outcomes],
                [outcome.loss for outcome in outcomes],
                sent["elements"] / STEPS,
            )
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder, port = tmp_path_factory.mktemp("ranks"), trainer_processes._free_port()
    processes = []
    for rank in range(2):
        here = {**trainer_processes.without_launcher(), **trainer_processes._environment(rank, 2, port)}
        here["PYTHONPATH"] = str(Path(trainer_processes.__file__).parent)
        processes.append(subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=here))
    assert [process.wait(120) for process in processes] == [0, 0]
    return torch.load(folder / "found.pt")


def in_one_process() -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights, gradient norms and losses of torch's AdamW on all rows of both ranks at once."""
    model, norms, losses = Late(), [], []
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=1e-2, betas=RECIPE.betas, eps=RECIPE.eps)
    for step in range(STEPS):
        parts = [model(*rows(step, rank, i)).loss for rank in range(2) for i in range(MICRO_BATCHES)]
        loss = torch.stack(parts).mean()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), RECIPE.gradient_clipping)))
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, norms, losses


@pytest.mark.parametrize("way", WAYS)
def test_updates_are_torchs_on_all_rows(found: dict, way: str) -> None:
    (weights, norms, losses), (ours, our_norms, our_losses, _) = in_one_process(), found["fp32", way]
    assert our_norms == pytest.approx(norms, rel=1e-5)
    assert our_losses == pytest.approx(losses, rel=1e-6)
    for name, weight in weights.items():  # an update moves a weight by up to the rate of 1e-2: a thousandth of that
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", ["directly", "once"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_both_ways_are_as_near_to_fp32(found: dict, precision: str, way: str) -> None:
    """Rounding the sum once errs no more than rounding each part."""
    exact = found["fp32", way][1]
    errors = [
        max(abs(a / b - 1) for a, b in zip(found[precision, other][1], exact, strict=True))
        for other in (way, "each micro-batch")
    ]
    assert errors[0] <= max(2 * errors[1], {"bf16": 2**-8, "fp16": 2**-11}[precision])
    for name, weight in found["fp32", way][0].items():
        difference = (found[precision, way][0][name].float() - weight).abs().max()
        usual = (found[precision, "each micro-batch"][0][name].float() - weight).abs().max()
        assert difference <= 2 * usual + 1e-3, name


def test_elements_sent(found: dict) -> None:
    """DeepSpeed all-reduces each gradient once per step, or once per micro-batch. Directly, half of the gradients and
    half of the updated weights are sent, together as much as one all-reduce. The rest is scalars."""
    parameters = sum(p.numel() for p in Late().parameters())
    for precision in ("fp32", "bf16", "fp16"):
        for way in WAYS:
            reductions = MICRO_BATCHES if way == "each micro-batch" else 1
            assert found[precision, way][3] == pytest.approx(reductions * parameters, rel=0.01), way


@pytest.mark.parametrize("way", ["directly", "directly, graph", "once, graph"])
def test_ways_agree_bit_for_bit_in_fp32(found: dict, way: str) -> None:
    """A sum of two ranks' gradients is the same in either order, and the half of a float32 is exact."""
    (ours, norms, losses, _), (theirs, their_norms, their_losses, _) = found["fp32", way], found["fp32", "once"]
    assert (norms, losses) == (their_norms, their_losses)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize(("device", "ranks", "expected"), [("cuda", 8, False), ("cuda", 64, True), ("cpu", 2, True)])
def test_buckets_are_all_reduced_among_many_ranks_and_by_gloo(device: str, ranks: int, expected: bool) -> None:
    config = deepspeed_config(RECIPE, World(0, ranks, 0, torch.device(device)), "bf16", 2, 1, 1000)
    assert config["zero_optimization"]["use_multi_rank_bucket_allreduce"] is expected


@pytest.mark.parametrize(
    ("choice", "ranks", "accumulation", "gigabytes", "expected"),
    [
        ("auto", 2, 4, 80, True),
        ("auto", 2, 4, 40, False),  # 5.7 GB of sums are more than a tenth
        ("auto", 2, 4, None, True),
        ("auto", 1, 4, 80, False),
        ("step", 1, 4, 80, False),
        ("step", 2, 1, 80, False),
        ("step", 2, 4, 40, True),
        ("micro-batch", 2, 4, 80, False),
    ],
)
def test_when(
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    ranks: int,
    accumulation: int,
    gigabytes: int | None,
    expected: bool,
) -> None:
    memory = SimpleNamespace(total_memory=(gigabytes or 0) * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    world = World(0, ranks, 0, torch.device("cpu" if gigabytes is None else "cuda"))
    options = Options(model=PhiConfig.preset("phi-1.5"), reduce_gradients=choice)  # type: ignore[arg-type]
    assert reduces_once(options, world, accumulation) is expected


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2])

"""Three ranks average flat tensors to their owners and gather partitions, against NumPy's sums in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trainer_processes

from phi_fast.training.distributed import World
from phi_fast.training.partitions import average_to_owners, gather, sends_directly

RANKS = 3
SIZES = (3 * 1000, 3 * 7)
"""Elements of two groups."""


def values(rank: int, size: int) -> np.ndarray:
    return np.random.default_rng([rank, size]).standard_normal(size)


def exchange(rank: int, folder: str) -> None:
    """Average and gather both groups on this rank; keep the results and the bytes sent."""
    dist.init_process_group("gloo")
    world = World(rank, RANKS, rank, torch.device("cpu"))
    sent, isend = [], dist.isend
    dist.isend = lambda tensor, *args, **kwargs: sent.append(tensor.nbytes) or isend(tensor, *args, **kwargs)
    found = {}
    for name, held, wire in (
        ("fp32", torch.float32, torch.float32),
        ("sums", torch.float32, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
    ):
        flats = [torch.from_numpy(values(rank, size)).to(held) for size in SIZES]
        found[name] = average_to_owners(flats, wire, world)
        found[f"{name} bytes"], sent[:] = sum(sent), []
    found["overflow"] = average_to_owners([torch.full((3,), 60000.0).half()], torch.float16, world)
    whole = [torch.full((RANKS, size // RANKS), -1.0) for size in SIZES]
    for group in whole:
        group[rank] = rank
    sent.clear()
    gather([list(group) for group in whole], world)
    found["gathered"], found["gather bytes"] = whole, sum(sent)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder, port = tmp_path_factory.mktemp("ranks"), trainer_processes._free_port()
    processes = []
    for rank in range(RANKS):
        here = {**trainer_processes.without_launcher(), **trainer_processes._environment(rank, RANKS, port)}
        here["PYTHONPATH"] = str(Path(trainer_processes.__file__).parent)
        processes.append(subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=here))
    assert [process.wait(120) for process in processes] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "rounding"), [("fp32", 2**-22), ("sums", 2**-8), ("fp16", 2**-10)])
def test_averages(found: list[dict], name: str, rounding: float) -> None:
    """Each owner's average is off by at most the rounding of what was sent, of two additions and of a division."""
    for group, size in enumerate(SIZES):
        parts = np.stack([values(rank, size) for rank in range(RANKS)])
        average = torch.from_numpy(parts.mean(0)).view(RANKS, -1)
        limit = torch.from_numpy(np.abs(parts).mean(0)).view(RANKS, -1) * rounding
        for rank in range(RANKS):
            ours = found[rank][name][group]
            assert ours.dtype == torch.float32
            assert bool(((ours.double() - average[rank]).abs() <= limit[rank]).all())


def test_16_bit_parts_are_added_in_fp32(found: list[dict]) -> None:
    """Three times 60,000 is more than the largest fp16, and their average is not."""
    assert [float(part["overflow"][0]) for part in found] == [60000.0] * RANKS


def test_each_rank_gathers_all_parts(found: list[dict]) -> None:
    for part in found:
        for group, size in zip(part["gathered"], SIZES, strict=True):
            assert group.tolist() == [[float(rank)] * (size // RANKS) for rank in range(RANKS)]


def test_bytes_sent(found: list[dict]) -> None:
    """A rank sends each part that it does not own, once, in the number format of the wire, and its own part twice."""
    elements = sum(SIZES) * (RANKS - 1) // RANKS
    for part in found:
        assert [part[f"{name} bytes"] for name in ("fp32", "sums", "fp16")] == [
            4 * elements,
            2 * elements,
            2 * elements,
        ]
        assert part["gather bytes"] == 4 * elements


@pytest.mark.parametrize(("device", "ranks", "expected"), [("cpu", 2, True), ("cpu", 1, False), ("cuda", 2, False)])
def test_gloo_sends_directly(device: str, ranks: int, expected: bool) -> None:
    assert sends_directly(World(0, ranks, 0, torch.device(device))) is expected


if __name__ == "__main__":
    exchange(int(sys.argv[1]), sys.argv[2])

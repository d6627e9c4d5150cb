"""The trainer's step beside torch's DistributedDataParallel on ranks of one machine: host time, CPU time, bytes sent.

`torchrun --nproc_per_node 2 -m benchmarks.ddp` prints them as JSON. Both train Phi with FusedAdam in fp32 over gloo and
reduce gradients once per step. Micro-batches are so small that communication and Python show.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
import tyro
from torch import nn

from benchmarks import models
from benchmarks.steps import RECIPE, Step
from phi_fast import Phi, PhiConfig
from phi_fast.kernels import FusedAdam
from phi_fast.startup import tolerate_encodings
from phi_fast.training.distributed import World, join, leave
from phi_fast.training.parameters import parameter_groups
from phi_fast.training.zero import Zero2

TOKENS = 64
"""Tokens of a micro-batch."""


def trainer(config: PhiConfig, world: World, micro_batches: int) -> Step:
    options = {"precision": "fp32", "micro_batch_size": 1, "accumulation": micro_batches, "reduce_once": True}
    zero = Zero2(Phi(config), RECIPE.replace(model=config), world, **options)  # type: ignore[arg-type]
    batch = rows(config)

    def step() -> None:
        for _ in range(micro_batches):
            zero.backward(zero.loss(*batch))
        zero.step(1e-4)

    return step


def ddp(config: PhiConfig, micro_batches: int) -> Step:
    model = nn.parallel.DistributedDataParallel(Phi(config))
    optimizer = FusedAdam(parameter_groups(model, RECIPE), lr=1e-4)
    batch = rows(config)

    def step() -> None:
        with model.no_sync():
            for _ in range(micro_batches - 1):
                (model(*batch).loss / micro_batches).backward()
        (model(*batch).loss / micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows(config: PhiConfig) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, config.vocab_size, (1, TOKENS + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def measure(preset: models.Preset = "phi-tiny", micro_batches: int = 2, repeats: int = 24) -> None:
    """Time both in turn, in either order, and print medians as JSON; the ratios are medians over the rounds.

    Another program that uses the loopback meanwhile adds to the bytes.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    world = join("cpu")
    config = models.of(preset)
    steps = {"trainer": trainer(config, world, micro_batches), "DDP": ddp(config, micro_batches)}
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "CPU seconds": [], "bytes": []} for name in steps}
    for round_ in range(2 + repeats):
        for name, step in list(steps.items())[:: (-1) ** round_]:
            world.barrier()
            sent, begin, cpu = loopback_bytes(), time.perf_counter(), time.process_time()
            step()
            used = time.process_time() - cpu
            world.barrier()
            if round_ > 1:
                values = time.perf_counter() - begin, used, loopback_bytes() - sent
                for kind, value in zip(found[name].values(), values, strict=True):
                    kind.append(value)
    if world.is_main:
        medians = {name: {kind: statistics.median(v) for kind, v in kinds.items()} for name, kinds in found.items()}
        ratios = {
            kind: statistics.median(a / b for a, b in zip(found["trainer"][kind], found["DDP"][kind], strict=True))
            for kind in found["DDP"]
        }
        print(json.dumps({"ranks": world.size, **medians, "trainer ÷ DDP": ratios}, ensure_ascii=False), flush=True)
    leave()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run `measure`."""
    tolerate_encodings()
    tyro.cli(measure, args=arguments, prog="python -m benchmarks.ddp")


if __name__ == "__main__":
    main()

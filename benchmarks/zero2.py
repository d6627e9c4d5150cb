"""Whole training steps under DeepSpeed ZeRO-2, of this project's trainer and of transformers' model, on any number of
ranks.

`torchrun --nproc_per_node 2 -m benchmarks.zero2 PRESET DTYPE REPEATS` prints each contender's seconds, measured on rank
0 between barriers, as JSON.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import tyro

from benchmarks import models
from benchmarks.steps import RECIPE, Step, shape
from phi_fast import Phi, PhiConfig
from phi_fast.precision import Precision
from phi_fast.startup import tolerate_encodings
from phi_fast.training.distributed import World, deepspeed, join, leave
from phi_fast.training.parameters import parameter_groups
from phi_fast.training.zero import Zero2


def trainer(config: PhiConfig, rows: int, world: World, dtype: Precision, *, fused: bool) -> Step:
    """The trainer's step: DeepSpeed's engine partitions the gradients, then this project's or DeepSpeed's own optimizer
    pass runs."""
    batch = models.data(config, rows, world.device)
    options: dict[str, Any] = {"precision": dtype, "micro_batch_size": rows, "accumulation": 1}
    zero = Zero2(Phi(config).to(world.device), RECIPE.replace(model=config), world, fused=fused, **options)

    def step() -> None:
        zero.backward(zero.loss(*batch))
        zero.step(1e-4)

    return step


def transformers(config: PhiConfig, rows: int, world: World, dtype: Precision) -> Step:
    """transformers' model and torch's fused AdamW, under the same engine with the same settings."""
    batch = models.data(config, rows, world.device)
    model = models.hugging_face(config).to(world.device)
    settings = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": RECIPE.gradient_clipping,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        dtype: {"enabled": True},
    }
    if dtype == "fp32":
        del settings[dtype]
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=1e-4, fused=True)
    engine = deepspeed(world.device.type).initialize(model=model, optimizer=optimizer, config=settings)[0]

    def step() -> None:
        engine.backward(models.loss_of_hugging_face(engine, *batch))
        engine.step()

    return step


def contenders(config: PhiConfig, rows: int, world: World, dtype: Precision) -> dict[str, Step]:
    return {
        "phi_fast trainer": trainer(config, rows, world, dtype, fused=True),
        "phi_fast, DeepSpeed's own step": trainer(config, rows, world, dtype, fused=False),
        "transformers + DeepSpeed": transformers(config, rows, world, dtype),
    }


def measure(preset: models.Preset, dtype: Precision, repeats: int) -> None:
    """Print each contender's seconds under ZeRO-2, as JSON. preset: "small NAME" for the small run's model."""
    torch.manual_seed(0)
    world = join("auto")
    config, rows = shape(preset)
    steps = contenders(config, rows, world, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(1 + repeats):
        for name, step in steps.items():
            world.barrier()
            begin = time.perf_counter()
            step()
            world.barrier()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    if world.is_main:
        print(json.dumps({"seconds": seconds, "threads": torch.get_num_threads(), "ranks": world.size}), flush=True)
    leave()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run `measure`."""
    tolerate_encodings()
    tyro.cli(measure, args=arguments, prog="python -m benchmarks.zero2", config=(tyro.conf.PositionalRequiredArgs,))


if __name__ == "__main__":
    main()

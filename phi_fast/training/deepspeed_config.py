"""DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from ..precision import Precision
from ..recipes import Recipe
from .deferred_gradients import reduces_to_owners
from .distributed import World


def deepspeed_config(
    recipe: Recipe, world: World, precision: Precision, micro_batch_size: int, accumulation: int, parameters: int
) -> dict[str, Any]:
    """Make DeepSpeed's configuration; surprising defaults (clipping, accumulation dtype) are set explicitly.

    parameters: their number.
    """
    # DeepSpeed's default bucket has 500 M elements; a small model's buffer need not be larger than the model.
    bucket = min(500_000_000, max(1_000_000, parameters))
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world.size,
        "gradient_clipping": recipe.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": world.device.type == "cuda",
            "reduce_bucket_size": bucket,
            "use_multi_rank_bucket_allreduce": not reduces_to_owners(world.size, world.device.type),
            "allgather_bucket_size": bucket,
            "round_robin_gradients": False,
        },
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": int(recipe.initial_loss_scale).bit_length() - 1,
            "loss_scale_window": recipe.loss_scale_window,
            "hysteresis": recipe.loss_scale_hysteresis,
            "min_loss_scale": max(1, int(recipe.min_loss_scale)),
        },
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }

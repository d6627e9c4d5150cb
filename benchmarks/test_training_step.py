"""One training step (forward, backward, clip, Adam) in fp32 and bf16, beside transformers' and litgpt's, and the floor.

The floor is the part that no packing or fusing can remove: only the matrix products, merged as in the parallel block,
and torch's scaled_dot_product_attention forward and backward. Peak memory is that of a process that only takes such
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import models, sizes
from benchmarks.harness import Results, compare, compare_apart
from benchmarks.ops import DTYPES
from benchmarks.peers import absent
from benchmarks.steps import (
    FLOOR,
    LEFT_OUT,
    ROWS,
    Step,
    floor,
    in_a_process,
    litgpt,
    ours,
    shape,
    transformers_compiled,
    transformers_eager,
    with_rates,
)
from benchmarks.subjects import Contender, Row, Subject
from benchmarks.timing import device


@pytest.mark.parametrize("dtype", sizes.DTYPES)
@pytest.mark.parametrize("preset", ["phi-1.5"] if sizes.GPU else ["phi-tiny", "phi-small"])
def test_training_step(preset: str, dtype: str, full: bool, results: Results) -> None:
    """On a GPU phi-1.5 whole, one contender after the other: their optimizers do not fit into its memory together."""
    where, (config, rows) = device(), shape(preset if full else f"small {preset}")
    batch = models.data(config, rows, where)
    kind = DTYPES[dtype]
    flops = rows * config.max_position_embeddings * config.flops_per_token(config.max_position_embeddings, causal=True)
    steps: Mapping[str, Callable[[], Step | str]] = {
        "phi_fast": lambda: ours(config, batch, kind),
        "transformers eager": lambda: transformers_eager(config, batch, kind),
        "transformers torch.compile": lambda: transformers_compiled(config, batch, kind, full),
        "litgpt": lambda: litgpt(config, batch, kind) if preset != "phi-small" or dtype == "bf16" else LEFT_OUT,
        FLOOR: lambda: floor(config, rows, kind, where),
        "Liger-Kernel": lambda: absent("liger_kernel") or "does not cover phi",
    }

    def contender(make: Callable[[], Step | str]) -> Contender | str:
        made = make()
        return made if isinstance(made, str) else Contender(made, flops=flops)

    makers = {name: partial(contender, make) for name, make in steps.items()}
    options: dict[str, Any] = {
        "config": {"rows": rows, "tokens per row": config.max_position_embeddings, "FLOPs": flops},
        "repeats": 9 if full else 1,
        "warmup": 2 if full and preset == "phi-tiny" else 1,
        "budget": {"phi-tiny": 15.0, "phi-small": 40.0, "phi-1.5": 8.0}[preset],
    }
    name = f"training step, {preset}, {dtype}"
    if sizes.GPU:
        subject = compare_apart(name, makers, **options)
    else:
        subject = compare(name, {name: make() for name, make in makers.items()}, **options)
    results.add(with_rates(subject, rows * config.max_position_embeddings))


@pytest.mark.slow
def test_peak_memory(full: bool, results: Results) -> None:
    """Peak resident size of a process that takes two steps, with the imports, whose share the row shows."""
    if device().type != "cpu":
        pytest.skip("on a GPU the rows of the training step show the allocator's peak")
    preset, rows = "phi-small" if full else "small phi-small", []
    for name in ("phi_fast", "transformers eager") if full else ("phi_fast",):
        found = in_a_process("benchmarks.one_process", preset, "bf16", name)
        extra = {"peak MB": found["peak_mb"], "of them imports": found["imports_mb"]}
        rows.append(Row(name, found["seconds"], "one step, after one untimed", extra))
    config = {"model": preset, "rows": ROWS["phi-small"] if full else 1, "threads": torch.get_num_threads()}
    results.add(Subject("peak memory of a step, phi-small, bf16", config, rows))

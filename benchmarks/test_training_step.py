"""One training step (forward, backward, Adam), and the same under DeepSpeed ZeRO-2, against transformers and the floor.

The floor is what no packing or fusing can remove: the matrix products alone, merged as in the parallel block, and
torch's scaled_dot_product_attention forward and backward, with nothing between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PhiConfig as HuggingFaceConfig
from transformers import PhiForCausalLM

from benchmarks.harness import Results, compare
from phi_fast import Phi, PhiConfig
from phi_fast.distributed import deepspeed, join
from phi_fast.kernels import FusedAdam
from phi_fast.recipes import RECIPES
from phi_fast.zero import Zero2, parameter_groups

ROWS = {"phi-tiny": 8, "phi-small": 4}
RECIPE = RECIPES["tiny"]
Step = Callable[[], object]


def data(config: PhiConfig, rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(config.vocab_size, (rows, config.max_position_embeddings + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def hugging_face(config: PhiConfig) -> nn.Module:
    fields = {name: value for name, value in config.to_dict().items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 0.5}
    shape = HuggingFaceConfig(
        **fields, intermediate_size=config.intermediate_size, rope_parameters=rope, attn_implementation="sdpa"
    )
    shape.resid_pdrop = shape.embd_pdrop = shape.attention_dropout = 0.0
    shape.use_cache = False
    return PhiForCausalLM(shape).train()


def their_loss(model: Callable[..., Any], input_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(config: PhiConfig, batch: tuple[Tensor, Tensor]) -> Step:
    model = Phi(config)
    optimizer = FusedAdam(parameter_groups(model, RECIPE), lr=1e-4)
    return bare_step(model, optimizer, lambda: model(*batch).loss)


def transformers_eager(config: PhiConfig, batch: tuple[Tensor, Tensor]) -> Step:
    model = hugging_face(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=1e-4, fused=True)
    return bare_step(model, optimizer, lambda: their_loss(model, *batch))


def transformers_compiled(config: PhiConfig, batch: tuple[Tensor, Tensor]) -> Step:
    model = hugging_face(config)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=1e-4, fused=True)
    return bare_step(model, optimizer, lambda: their_loss(compiled, *batch))


def floor(config: PhiConfig, rows: int) -> Step:
    """The products of one step on buffers of their shapes, and torch's attention."""
    d, heads, length = config.hidden_size, config.num_attention_heads, config.max_position_embeddings
    tokens = rows * length
    h, packed, mixed = torch.randn(tokens, d), torch.randn(tokens, 7 * d), torch.randn(tokens, 5 * d)
    w_in, w_out = torch.randn(7 * d, d), torch.randn(d, 5 * d)
    chunk = torch.randn(tokens, config.vocab_size // 8)
    head = torch.randn(config.vocab_size // 8, d)
    q, k, v = (torch.randn(rows, heads, length, 64, requires_grad=True) for _ in range(3))
    gradient = torch.randn(rows, heads, length, 64)

    def step() -> None:
        for _ in range(config.num_hidden_layers):
            h @ w_in.T  # forward
            mixed @ w_out.T
            h @ w_out  # data gradients
            packed @ w_in
            packed.T @ h  # weight gradients
            h.T @ mixed
            F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)
        for _ in range(8):  # the head, in eight parts of the vocabulary
            h @ head.T
            chunk @ head
            chunk.T @ h

    return step


@pytest.mark.parametrize("preset", ["phi-tiny", "phi-small"])
def test_training_step(preset: str, full: bool, results: Results) -> None:
    config, rows = PhiConfig.preset(preset), ROWS[preset]
    if not full:
        config = config.replace(num_hidden_layers=1, vocab_size=512, max_position_embeddings=64)
        rows = 1
    torch.manual_seed(0)
    batch = data(config, rows)
    contenders: dict[str, Step | str] = {
        "phi_fast": ours(config, batch),
        "transformers eager": transformers_eager(config, batch),
        "matrix products and SDPA alone": floor(config, rows),
    }
    if full:
        contenders["transformers torch.compile"] = transformers_compiled(config, batch)
    subject = compare(
        f"training step, {preset}, fp32",
        contenders,
        config={"rows": rows, "tokens a row": config.max_position_embeddings},
        repeats={"phi-tiny": 9, "phi-small": 3}[preset] if full else 1,
        warmup=2 if full else 0,
    )
    for row in subject.rows:
        if row.median:
            row.extra["tokens/s"] = round(rows * config.max_position_embeddings / row.median)
    results.add(subject)


def test_step_under_zero2(full: bool, results: Results) -> None:
    """phi-tiny under DeepSpeed ZeRO-2 in one process: what the engine adds to our step, and to transformers'."""
    config = PhiConfig.preset("phi-tiny")
    rows = ROWS["phi-tiny"]
    if not full:
        config = config.replace(num_hidden_layers=1, vocab_size=512, max_position_embeddings=64)
        rows = 1
    world = join("cpu")
    torch.manual_seed(0)
    batch = data(config, rows)
    recipe = RECIPE.replace(model=config)
    options: dict[str, Any] = {"precision": "fp32", "micro_batch_size": rows, "accumulation": 1}
    fused, stock = (Zero2(Phi(config), recipe, world, fused=flag, **options) for flag in (True, False))

    def trainer_step(zero: Zero2) -> Step:
        def step() -> None:
            zero.backward(zero.loss(*batch))
            zero.step(1e-4, last_micro_batch=True)

        return step

    their_model = hugging_face(config)
    their_optimizer = torch.optim.AdamW(parameter_groups(their_model, recipe), lr=1e-4, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed("cpu").initialize(model=their_model, optimizer=their_optimizer, config=settings)[0]

    def their_step() -> None:
        engine.backward(their_loss(engine, *batch))
        engine.step()

    subject = compare(
        "training step under DeepSpeed ZeRO-2, phi-tiny, fp32, 1 process",
        {
            "phi_fast trainer": trainer_step(fused),
            "phi_fast, DeepSpeed's own step": trainer_step(stock),
            "phi_fast without DeepSpeed": ours(config, batch),
            "transformers + DeepSpeed": their_step,
        },
        config={"rows": rows, "tokens a row": config.max_position_embeddings},
        repeats=9 if full else 1,
        warmup=2 if full else 0,
    )
    for row in subject.rows:
        if row.median:
            row.extra["tokens/s"] = round(rows * config.max_position_embeddings / row.median)
    results.add(subject)

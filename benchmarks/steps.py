"""Training steps of this project and of its peers, and the floor that no step can go below."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models
from benchmarks.peers import NOT_COMPILED, compiled, peer
from benchmarks.subjects import Subject
from phi_fast import Phi, PhiConfig, data
from phi_fast.kernels import FusedAdam
from phi_fast.kernels.adam import grad_norm_squared, unscale_and_clip
from phi_fast.recipes import RECIPES
from phi_fast.training import cuda_graphs
from phi_fast.training.cuda_graphs import Capture, CapturedMicroBatch
from phi_fast.training.distributed import World
from phi_fast.training.parameters import parameter_groups

ROWS = {"phi-tiny": 8, "phi-small": 4, "phi-1.5": 4, "a quarter of phi-1.5": 4}
RECIPE = RECIPES["tiny"]
FLOOR = "matrix products and SDPA alone"
LEFT_OUT = "left out because it takes long: measured in bf16, and with phi-tiny"
Step = Callable[[], object]
Batch = tuple[Tensor, Tensor]


def shape(preset: models.Preset) -> tuple[PhiConfig, int]:
    """(configuration, rows per step) of a preset; "small NAME" gives those of the small run."""
    name = preset.removeprefix("small ")
    config = models.of(name)
    return (config, ROWS[name]) if name == preset else (models.small(config), 1)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(config: PhiConfig, batch: Batch, dtype: torch.dtype) -> Step:
    """This project's step: fp32 masters for 16-bit weights; the update's pass also clips, and skips on overflow."""
    model = Phi(config).to(batch[0].device, dtype)
    optimizer = FusedAdam(parameter_groups(model, RECIPE), lr=1e-4, master_weights=dtype != torch.float32)

    def step() -> None:
        model(*batch).loss.backward()
        norm_squared = grad_norm_squared([p.grad for p in model.parameters() if p.grad is not None])
        clip, found_inf, _ = unscale_and_clip(norm_squared, max_norm=1.0)
        optimizer.step(grad_scale=clip, found_inf=found_inf)
        optimizer.zero_grad()

    return step


def captured(config: PhiConfig, batch: Batch, dtype: torch.dtype, capture: Capture = cuda_graphs.capture) -> Step:
    """The step of `ours` with forward and backward replayed from a CUDA graph, as `train --cuda-graphs` does."""
    device = batch[0].device
    model = Phi(config).to(device, dtype)
    optimizer = FusedAdam(parameter_groups(model, RECIPE), lr=1e-4, master_weights=dtype != torch.float32)
    loss = torch.zeros((), device=device)
    micro_batch = CapturedMicroBatch(model, loss, World(0, 1, 0, device), 1, capture)
    rows = data.Batch(*batch, range(len(batch[0])), torch.zeros(len(batch[0]), dtype=torch.int32))

    def step() -> None:
        micro_batch(rows, 1.0, first=True)
        for parameter, gradient in micro_batch.gradients.items():
            parameter.grad = gradient
        norm_squared = grad_norm_squared(list(micro_batch.gradients.values()))
        clip, found_inf, _ = unscale_and_clip(norm_squared, max_norm=1.0)
        optimizer.step(grad_scale=clip, found_inf=found_inf)

    return step


def stock_step(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    batch: Batch,
    dtype: torch.dtype,
    compile: Callable[[nn.Module], nn.Module | None] = lambda model: model,
) -> Step | str:
    """A step of a peer's model under torch's fused AdamW, which keeps its state in the weights' dtype."""
    model = model.to(batch[0].device, dtype)
    run = compile(model)
    if run is None:
        return NOT_COMPILED
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=1e-4, fused=True)
    return bare_step(model, optimizer, lambda: loss(run, *batch))


def transformers_eager(config: PhiConfig, batch: Batch, dtype: torch.dtype) -> Step | str:
    return stock_step(models.hugging_face(config), models.loss_of_hugging_face, batch, dtype)


def transformers_compiled(config: PhiConfig, batch: Batch, dtype: torch.dtype, full: bool) -> Step | str:
    model = models.hugging_face(config)
    return stock_step(model, models.loss_of_hugging_face, batch, dtype, lambda model: compiled(model, full))


def litgpt(config: PhiConfig, batch: Batch, dtype: torch.dtype) -> Step | str:
    return peer("litgpt", lambda: stock_step(models.litgpt(config), models.loss_of_litgpt, batch, dtype))


def floor(config: PhiConfig, rows: int, dtype: torch.dtype, where: torch.device) -> Step:
    """The matrix products of one step, on buffers of the same shapes, and torch's attention."""
    d, heads, length = config.hidden_size, config.num_attention_heads, config.max_position_embeddings
    tokens = rows * length
    part = config.vocab_size // 8
    shapes = ((tokens, d), (tokens, 7 * d), (tokens, 5 * d), (7 * d, d), (d, 5 * d), (tokens, part), (part, d))
    h, packed, mixed, w_in, w_out, chunk, head = (torch.randn(*s, device=where).to(dtype) for s in shapes)
    sides = (rows, heads, length, config.head_dim)
    q, k, v = (torch.randn(sides, device=where).to(dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(sides, device=where).to(dtype)

    def step() -> None:
        for _ in range(config.num_hidden_layers):
            h @ w_in.T  # forward
            mixed @ w_out.T
            h @ w_out  # data gradients
            packed @ w_in
            packed.T @ h  # weight gradients
            h.T @ mixed
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(attended, (q, k, v), gradient)
        for _ in range(8):  # the head, in eight parts of the vocabulary
            h @ head.T
            chunk @ head
            chunk.T @ h

    return step


def with_rates(subject: Subject, tokens: int) -> Subject:
    """Add tokens per second to every row of a subject whose steps have `tokens` tokens."""
    for row in subject.rows:
        if row.median:
            row.extra["tokens/s"] = round(tokens / row.median)
    return subject


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Run `python -m` with these arguments in a separate process, and return the JSON object that it prints last."""
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))

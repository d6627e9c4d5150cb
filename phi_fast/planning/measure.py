"""Comparison of the plan with real training steps on this machine: time, and memory kept for the backward pass."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..model.lora import add_lora
from ..model.phi import Phi
from ..precision import DTYPES, Precision
from ..training.distributed import join
from ..training.zero import Zero2
from .estimate import Job, plan
from .host import probe
from .memory import activations
from .work import Shape


@dataclass(frozen=True)
class Judged:
    """Predicted and measured figures of this machine."""

    predicted_seconds: float
    measured_seconds: float
    """Both times are medians over the rounds."""
    ratio: float
    """Median over the rounds of predicted ÷ measured, so that a drift of the machine's speed cancels."""
    predicted_activation_bytes: int
    measured_activation_bytes: int
    """Bytes that autograd holds after a forward pass, without parameters and rotary table."""
    predicted_peak_bytes: float
    measured_peak_bytes: int
    """Peak memory of tensors in a step, from torch's record of allocations."""


def judge(job: Job, rows: int, precision: Precision, *, rounds: int = 3) -> Judged:
    """Compare plans with measured steps of `zero.Zero2`, the trainer's engine, on random tokens.

    After a warm-up step, each of `rounds` rounds probes the machine, plans, and takes a step in micro-batches of `rows`
    rows.
    """
    recipe, shape = job.recipe, job.shape(rows)
    torch.manual_seed(recipe.seed)
    model = Phi(recipe.model, recompute=shape.recompute).to(DTYPES[precision])
    if recipe.lora is not None:
        add_lora(model, recipe.lora)
    kept = kept_for_backward(model, shape)
    accumulation = recipe.global_batch_size // rows
    zero = Zero2(model, recipe, join("cpu"), precision=precision, micro_batch_size=rows, accumulation=accumulation)
    step = Step(zero, recipe.learning_rate, shape, accumulation)
    now, predicted, measured = job, [], []
    for round_ in range(1 + rounds):
        if round_:
            now = replace(job, device=probe(shape, precision), micro_batch_size=rows)
            predicted.append(plan(now).step_seconds)
        start = time.perf_counter()
        step()
        if round_:
            measured.append(time.perf_counter() - start)
    return Judged(
        predicted_seconds=statistics.median(predicted),
        measured_seconds=statistics.median(measured),
        ratio=statistics.median(a / b for a, b in zip(predicted, measured, strict=True)),
        predicted_activation_bytes=activations(shape).total,
        measured_activation_bytes=kept,
        predicted_peak_bytes=plan(now).memory.peak,
        measured_peak_bytes=peak_bytes(step),
    )


@dataclass(frozen=True)
class Step:
    """One optimizer step of the trainer's engine on random tokens."""

    zero: Zero2
    learning_rate: float
    shape: Shape
    accumulation: int

    def __call__(self) -> None:
        for _ in range(self.accumulation):
            self.zero.backward(self.zero.loss(*_tokens(self.shape)))
        self.zero.step(self.learning_rate)


def peak_bytes(step: Step) -> int:
    """Measure weights and optimizer state, plus the peak of what a step allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found = profiler.profiler.kineto_results.events()
    allocated = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    beside = max(accumulate(size for _, size in allocated))
    resident = [*step.zero.model.parameters(), *step.zero.partitions().values()]
    return beside + sum(tensor.nbytes for tensor in resident)


def kept_for_backward(model: Phi, shape: Shape) -> int:
    """Measure the bytes of the distinct storages that autograd saves in one forward pass.

    A view counts as the whole buffer that it keeps alive. The model's parameters and buffers are not counted.
    """
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*_tokens(shape)).loss  # keeps the graph, so that no address is reused
    total = sum(storages.values())
    del loss
    return total


def _tokens(shape: Shape) -> tuple[Tensor, Tensor]:
    ids = torch.randint(shape.config.vocab_size, (shape.rows, shape.sequence + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

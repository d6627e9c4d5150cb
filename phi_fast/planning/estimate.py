"""The plan of a recipe on a number of devices, from the counted work and the devices' figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError
from ..kernels.backend import ROTARY_INSIDE
from ..recipes import Recipe
from ..training.deferred_gradients import sums_fit
from .communication import Communication, communication
from .devices import LAUNCH, Device
from .memory import Memory, hidden_matrices, memory
from .work import Kernel, Phase, Recompute, Shape, gradients, micro_batch, update


@dataclass(frozen=True)
class Job:
    """A recipe, the devices to train it on, and how."""

    recipe: Recipe
    device: Device
    ranks: int
    itemsize: int = 2
    recompute: Recompute = "norm_gelu"
    micro_batch_size: int | None = None
    """None: the largest that fits."""
    price: float | None = None
    """Price of a device hour; None: the device's default."""
    rotary_inside: bool = ROTARY_INSIDE["triton"]

    @property
    def on_gpu(self) -> bool:
        return self.device.memory is not None

    def shape(self, rows: int) -> Shape:
        recipe = self.recipe
        return Shape(
            recipe.model,
            recipe.sequence_length,
            rows,
            self.itemsize,
            self.recompute,
            self.rotary_inside,
            on_cpu=not self.on_gpu,
            lora=recipe.lora,
        )


@dataclass(frozen=True)
class Plan:
    """The planned figures of a job, per optimizer step. A field is None without a number of tokens or a price."""

    ranks: int
    micro_batch_size: int
    accumulation: int
    memory: Memory
    fits: bool
    largest_micro_batch: int
    """Largest divisor of a rank's rows that fits into memory; 0: none does."""
    reductions: int
    """How often gradients are reduced in a step: once, or for each micro-batch."""
    communication: Communication
    phases: dict[Phase, float]
    """Compute seconds per step: forward, backward, gradients, update."""
    step_seconds: float
    tokens_per_second: float
    """Tokens per second of all devices."""
    mfu_full: float
    """MFU with attention counted in full (PaLM, arXiv 2204.02311)."""
    mfu_causal: float
    """MFU with half of attention counted, as a causal mask leaves."""
    steps: int | None
    hours: float | None
    device_hours: float | None
    cost: float | None
    checkpoint_bytes: int
    loader_rows_per_second: float
    """Rows/s that the loaders of all ranks together must deliver."""
    loader_bytes_per_second: float
    """The same in bytes/s of uint16 token ids."""

    @property
    def times(self) -> dict[str, float]:
        """Seconds per step: the phases, and the communication that does not overlap with them."""
        times: dict[str, float] = dict(self.phases.items())
        return times | {"sending": self.communication.exposed_seconds + self.communication.gather_seconds}

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens_per_second / self.ranks


def plan(job: Job) -> Plan:
    """Plan a job. Raises UsageError if the global batch cannot be divided over ranks and micro-batches."""
    recipe, trained = job.recipe, job.recipe.trained_parameters
    rows = _rows(job)
    largest = largest_micro_batch(job)
    size = job.micro_batch_size or largest or 1
    if rows % size:
        raise UsageError(f"micro_batch_size={size} does not divide the {rows} rows of a rank; use a divisor")
    accumulation = rows // size
    used = _memory(job, size)
    phases = phase_seconds(job, size)
    reductions = 1 if _deferred(job, size) else accumulation
    sent = communication(trained, job.device, job.ranks, job.itemsize, reductions, phases["backward"] / accumulation)
    seconds = sum(phases.values()) + sent.exposed_seconds + sent.gather_seconds
    tokens = recipe.tokens_per_step
    peak = job.ranks * job.device.flops.value * seconds
    steps = None if recipe.tokens is None else recipe.steps
    hours = None if steps is None else steps * seconds / 3600
    price = job.price if job.price is not None else job.device.price.value if job.device.price else None
    device_hours = None if hours is None else hours * job.ranks
    return Plan(
        ranks=job.ranks,
        micro_batch_size=size,
        accumulation=accumulation,
        memory=used,
        fits=_fits(job, used),
        largest_micro_batch=largest,
        reductions=reductions,
        communication=sent,
        phases=phases,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu_full=recipe.flops_per_token(causal=False) * tokens / peak,
        mfu_causal=recipe.flops_per_token(causal=True) * tokens / peak,
        steps=steps,
        hours=hours,
        device_hours=device_hours,
        cost=None if device_hours is None or price is None else device_hours * price,
        checkpoint_bytes=trained * (job.itemsize + (12 if recipe.ema_decay is None else 16))
        - (4 * hidden_matrices(recipe.model) if recipe.optimizer == "muon" else 0),
        loader_rows_per_second=recipe.global_batch_size / seconds,
        loader_bytes_per_second=2 * tokens / seconds,
    )


def largest_micro_batch(job: Job) -> int:
    """Find the largest divisor of a rank's rows that fits into the device's memory; 0: none does."""
    rows = _rows(job)
    sizes = (size for size in range(rows, 0, -1) if rows % size == 0)
    return next((size for size in sizes if _fits(job, _memory(job, size))), 0)


def phase_seconds(job: Job, rows: int) -> dict[Phase, float]:
    """Estimate the compute seconds per step by phase, with micro-batches of `rows` rows."""
    seconds: dict[Phase, float] = dict.fromkeys(("forward", "backward", "gradients", "update"), 0.0)
    for kernel in kernels(job, rows):
        seconds[kernel.phase] += kernel_seconds(job.device, kernel, gpu=job.on_gpu)
    accumulation = _rows(job) // rows
    return {phase: value * (1 if phase == "update" else accumulation) for phase, value in seconds.items()}


def kernels(job: Job, rows: int) -> list[Kernel]:
    """List the kernels of one micro-batch of `rows` rows, and of the update."""
    recipe, accumulating = job.recipe, _rows(job) > rows
    trained = (recipe.trained_parameters, job.itemsize, job.ranks)
    deferred = _rows(job) // rows if _deferred(job, rows) else 1
    reduced = gradients(*trained, accumulating=accumulating, deferred=deferred)
    return [*micro_batch(job.shape(rows)), *reduced, *update(*trained, accumulating=accumulating)]


def kernel_seconds(device: Device, kernel: Kernel, *, gpu: bool) -> float:
    """Estimate the time of all `count` launches of a kernel."""
    once = device.seconds(kernel.kind, kernel.flops, kernel.bytes_moved)
    return kernel.count * max(once, LAUNCH.value if gpu else 0.0)


def _rows(job: Job) -> int:
    rows, left = divmod(job.recipe.global_batch_size, job.ranks)
    if job.ranks < 1 or rows < 1 or left:
        raise UsageError(
            f"gpus={job.ranks}: the global batch of {job.recipe.global_batch_size} rows cannot be shared out; use a "
            "divisor of it, or another --global-batch-size"
        )
    return rows


def _memory(job: Job, rows: int) -> Memory:
    accumulating, deferred = _rows(job) > rows, _deferred(job, rows)
    average = job.recipe.ema_decay is not None
    options = {"gpu": job.on_gpu, "accumulating": accumulating, "deferred": deferred, "average": average}
    options["muon"] = job.recipe.optimizer == "muon"
    return memory(job.shape(rows), job.ranks, **options)


def _deferred(job: Job, rows: int) -> bool:
    """Whether the trainer would reduce gradients once per step, as `--reduce-gradients auto` decides."""
    if job.ranks == 1 or _rows(job) == rows:
        return False
    return job.device.memory is None or sums_fit(job.recipe.trained_parameters, job.device.memory.value)


def _fits(job: Job, used: Memory) -> bool:
    return job.device.memory is None or math.floor(used.peak) <= job.device.memory.value

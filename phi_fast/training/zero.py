"""DeepSpeed ZeRO-2, and the optimizer step that replaces DeepSpeed's.

DeepSpeed partitions and communicates: after a backward pass, every rank has the averaged gradient of its flat partition
(over gloo `flat_gradients` averages; a single rank has the gradients that autograd made, see `gradients`).
`FusedStep` does the rest. One pass finds the norm and any overflow; another unscales, clips, applies Adam or Muon
and writes the 16-bit weights, unless a flag on the device says to skip the step. DeepSpeed's own step makes a pass for
each of these and waits for the host first.
Gradients are divided by the loss scale they were computed with: DeepSpeed 0.19.8 updates the scale first, so that its
step halves the update whenever the scale grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..data import Batch
from ..kernels import FusedAdam
from ..kernels.adam import adam_step_, grad_norm_squared, unscale_and_clip
from ..precision import Precision
from ..recipes import Recipe
from .average import WeightAverage
from .cuda_graphs import Capture, CapturedMicroBatch
from .deepspeed_config import deepspeed_config
from .distributed import World, deepspeed
from .gradients import Gradients, gradients_of
from .muon import MuonStep, moments
from .parameters import parameter_groups, trained_weights
from .partitions import gather, sends_directly
from .spikes import NO_FILTERS, SpikeFilters

INTERNALS = (
    *("bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups", "single_partition_of_fp32_groups"),
    *("averaged_gradients", "all_grad_tensors", "_get_preflattened_grad_partition"),
    *("_release_preflattened_grad_buffers", "flatten", "round_robin_bit16_meta", "round_robin_bit16_offsets"),
    *("loss_scaler", "_update_scale", "overflow", "_global_grad_norm", "micro_step_id"),
    *("nccl_start_alignment_factor", "allgather_bucket_size", "real_dp_process_group"),
    *("process_gradients", "overlapping_partition_gradients_reduce_epilogue", "round_robin_bit16_groups"),
    "_grad_acc_hooks",
)
"""Attributes of DeepSpeed's ZeRO-2 optimizer that this module uses; a version without one of them is refused."""


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of an optimizer step, the same on every rank except for `broken`."""

    loss: float
    """Mean loss of the global batch, in nats per token."""
    grad_norm: float | None
    """Global gradient norm, unscaled, before clipping; None if a gradient overflowed."""
    loss_scale: float
    """The loss scale of this step's gradients."""
    skipped: bool
    """Nothing was updated: a gradient overflowed, or there was a spike."""
    spike: bool
    """The loss or the gradient norm was a spike (`spikes.SpikeFilters`)."""
    hopeless: bool
    """A gradient overflowed and the loss scale cannot be lowered (without fp16 it never can): the next steps would
    overflow, too."""
    broken: bool
    """A weight or a moment in this rank's partition is not finite after the update, so the state must not be saved.
    Always False with DeepSpeed's own step, which does not check: then `checkpoint.save` does."""
    trained_tokens: int | None = None
    """Labels of the global batch that count in the loss; None if all do, because no corpus has marks."""


class Zero2:
    """A model under DeepSpeed ZeRO-2: `loss` and `backward` run once per micro-batch, then `step` updates weights."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        world: World,
        *,
        precision: Precision,
        micro_batch_size: int,
        accumulation: int,
        fused: bool = True,
        reduce_once: bool = False,
        capture: Capture | None = None,
    ) -> None:
        """Partition the state. fused: step by `FusedStep`, not by DeepSpeed. reduce_once: reduce gradients per step.
        capture: makes `micro_batch` a CUDA graph, and reduces once per step; ValueError unless `fused`."""
        if capture and not fused:
            raise ValueError("capture needs fused=True: DeepSpeed's own step needs DeepSpeed's hooks")
        if recipe.optimizer == "muon" and not fused:
            raise ValueError("optimizer='muon' needs fused=True: DeepSpeed's own step has Adam alone here")
        optimizer = FusedAdam(
            parameter_groups(model, recipe), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps
        )
        trained = sum(parameter.numel() for parameter in trained_weights(model).values())
        config = deepspeed_config(recipe, world, precision, micro_batch_size, accumulation, trained)
        self.engine = deepspeed(world.device.type).initialize(model=model, optimizer=optimizer, config=config)[0]
        self.world = world
        self.model = model
        self.zero = self.engine.optimizer
        self.accumulation = accumulation
        self._micro_batches = 0
        """Backward passes since the last step."""
        self._loss = torch.zeros((), device=world.device)
        """This rank's part of the step's mean loss."""
        self.dynamic = precision == "fp16"
        if self.dynamic:
            scaler = self.zero.loss_scaler
            scaler.raise_error_at_min_scale = False  # `StepOutcome.hopeless` reports it, and the weights stay usable
            scaler.min_scale = recipe.min_loss_scale  # DeepSpeed's own configuration takes only integers
        self.fused: FusedStep | None = None
        self._captured: CapturedMicroBatch | None = None
        if fused:
            _require_internals(self.zero, world)
            spikes = SpikeFilters.of(recipe, world.device)
            gradients = gradients_of(self.zero, world, accumulation, reduce_once=reduce_once or capture is not None)
            self.fused = FusedStep(self.zero, world, recipe.gradient_clipping, self._loss, gradients, spikes)
            self.fused.muon = MuonStep.of(self.zero, model, world, recipe)
            if recipe.ema_decay is not None:
                self.fused.average = WeightAverage(recipe.ema_decay, self.zero.single_partition_of_fp32_groups)
            self.zero.step = self.fused
            if capture:
                self._captured = CapturedMicroBatch(model, self._loss, world, accumulation, capture)

    @property
    def loss_scale(self) -> float:
        """The loss scale of the next gradients; 1 unless fp16."""
        return float(self.zero.loss_scale) if self.dynamic else 1.0

    def loss(
        self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, trained: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of one micro-batch, whose mean over all ranks and micro-batches is the step's loss.

        input_ids, labels: (batch, sequence) int64 on the model's device; cu_seqlens: see `Phi.forward`.
        trained: number of labels that count in the global batch, a scalar on the device. The step's loss is then the
        mean over these labels, of which each micro-batch may have another number, or none. None: all labels count.
        """
        documents = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        if trained is None:
            return self.engine(input_ids, labels, **documents).loss
        total = self.engine(input_ids, labels, reduction="sum", **documents).loss
        return total * (self.accumulation * self.world.size / trained.clamp(min=1))

    def backward(self, loss: Tensor) -> None:
        """Run backward for one micro-batch; after the last of `accumulation`, the averaged gradients are ready."""
        self._loss += loss.detach() / (self.accumulation * self.world.size)
        self.engine.backward(loss)
        self._count_micro_batch()

    def _count_micro_batch(self) -> None:
        self._micro_batches += 1
        if self._micro_batches < self.accumulation:
            self.engine.step()  # updates nothing: DeepSpeed counts micro-batches by calls of `step`

    def micro_batch(self, batch: Batch, trained: Tensor | None = None) -> None:
        """Run forward and backward for one micro-batch in host memory; see `backward`. trained: see `loss`."""
        if not self._captured:
            there = batch.to(self.world.device)
            self.backward(self.loss(there.input_ids, there.labels, there.cu_seqlens, trained))
            return
        assert trained is None  # the loop refuses such corpora
        self._captured(batch, self.loss_scale, first=self._micro_batches == 0)
        self._count_micro_batch()
        if self._micro_batches == self.accumulation:
            assert self.fused
            self.fused.gradients.accept(self._captured.gradients)

    def step(self, lr: float) -> StepOutcome:
        """Update the weights at learning rate `lr`, after `accumulation` backward passes.

        Raises RuntimeError after a different number of backward passes.
        """
        if self._micro_batches != self.accumulation:
            raise RuntimeError(f"step after {self._micro_batches} backward passes; expected {self.accumulation}")
        self._micro_batches = 0
        for group in self.zero.param_groups:
            group["lr"] = lr
        scale, at_minimum = self.loss_scale, self._scale_is_at_minimum()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        overflow, spike = bool(self.zero.overflow), self.fused is not None and self.fused.spike
        return StepOutcome(
            loss=self.fused.mean_loss if self.fused else self._mean_loss(),
            grad_norm=None if overflow or norm is None else float(norm),
            loss_scale=scale,
            skipped=overflow or spike,
            spike=spike,
            hopeless=overflow and at_minimum,
            broken=self.fused is not None and self.fused.broken,
        )

    @property
    def average(self) -> WeightAverage | None:
        """The moving average of the weights (`Recipe.ema_decay`)."""
        return self.fused.average if self.fused else None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model the averaged weights inside, and its own, bit for bit, after it; every rank calls it."""
        assert self.fused is not None and self.fused.average is not None
        parts = [parts[self.world.rank] for parts in self.zero.parallel_partitioned_bit16_groups]
        own = [part.detach().clone() for part in parts]
        try:
            self.fused.replace_weights(parts, self.fused.average.averages)
            yield
        finally:
            self.fused.replace_weights(parts, own)

    def _mean_loss(self) -> float:
        """Average the step's loss over the ranks, which DeepSpeed's own step does not do, and reset the sum."""
        if self.world.size > 1:
            dist.all_reduce(self._loss)
        mean = float(self._loss)
        self._loss.zero_()
        return mean

    def _scale_is_at_minimum(self) -> bool:
        """Return whether an overflow now would have to lower a scale that is at its minimum already."""
        scaler = self.zero.loss_scaler
        return not self.dynamic or (scaler.cur_scale <= scaler.min_scale and scaler.cur_hysteresis <= 1)

    def partitions(self) -> dict[str, Tensor]:
        """Return this rank's flat tensors by name and group: "master.0", "exp_avg.0", "exp_avg_sq.0", … (of Muon's
        group "momentum.0"), and with an average "ema.0", …"""
        tensors = {}
        for group, master in enumerate(self.zero.single_partition_of_fp32_groups):
            state = self.zero.optimizer.state[master]
            tensors[f"master.{group}"] = master.detach()
            for name in moments(self.zero.optimizer.param_groups[group]):
                tensors[f"{name}.{group}"] = state[name] if name in state else torch.zeros_like(master)
        averages = self.average.averages if self.average else []
        return tensors | {f"ema.{group}": average for group, average in enumerate(averages)}

    def partition_sizes(self) -> dict[str, tuple[int, int]]:
        """Map each name of `partitions` to (elements of this rank's part, elements of all parts without padding)."""
        sizes = {}
        for name, tensor in self.partitions().items():
            group = int(name.rsplit(".", 1)[1])
            last = self.zero.round_robin_bit16_offsets[group][-1] + self.zero.round_robin_bit16_meta[group][-1].numel()
            sizes[name] = (tensor.numel(), last)
        return sizes

    def checkpoint_bytes(self) -> int:
        """Compute the total size of the tensors that all ranks together save."""
        weights = sum(parameter.nbytes for parameter in trained_weights(self.model).values())
        return weights + 4 * sum(whole for _, whole in self.partition_sizes().values())

    def load(self, model: dict[str, Tensor], partitions: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Load a checkpoint's weights, optimizer tensors and `state_dict()`.

        An average that `partitions` lacks starts as these weights.
        """
        with torch.no_grad():
            for name, parameter in trained_weights(self.model).items():
                parameter.copy_(model[name])
            for group, master in enumerate(self.zero.single_partition_of_fp32_groups):
                master.copy_(partitions[f"master.{group}"])
                slot = self.zero.optimizer.state[master]
                slot["step"] = torch.tensor(float(state["updates"]), device=master.device)
                for name in moments(self.zero.optimizer.param_groups[group]):
                    slot[name] = partitions[f"{name}.{group}"].to(master.device)
        if self.average:
            averages = [tensor for name, tensor in partitions.items() if name.startswith("ema.")]
            self.average.load(averages or None)
        if self.dynamic:
            for name, value in state["loss_scaler"].items():
                setattr(self.zero.loss_scaler, name, value)
        if self.fused:
            self.fused.spikes.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return, JSON-able, the number of updates, in fp16 the loss scaler's state (scale, hysteresis, position in the
        window), and the averages of the spike filters."""
        master = self.zero.single_partition_of_fp32_groups[0]
        state = self.zero.optimizer.state[master]
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis") if self.dynamic else ()
        scaler = {name: getattr(self.zero.loss_scaler, name) for name in names}
        spikes = self.fused.spikes.state_dict() if self.fused else {}
        return {"updates": int(state["step"]) if "step" in state else 0, "loss_scaler": scaler, **spikes}


class FusedStep:
    """Replaces `DeepSpeedZeroOptimizer.step`: from averaged gradients to updated weights on every rank.

    loss: scalar, this rank's part of the step's mean loss; reset to 0 for the next step.
    gradients: the step's averaged gradients.
    """

    def __init__(
        self,
        zero: Any,
        world: World,
        clip: float,
        loss: Tensor,
        gradients: Gradients,
        spikes: SpikeFilters = NO_FILTERS,
    ) -> None:
        self.zero, self.world, self.clip, self.spikes = zero, world, clip, spikes
        self.loss, self.gradients = loss, gradients
        self.average: WeightAverage | None = None
        self.muon: MuonStep | None = None
        self.mean_loss = 0.0
        """Mean loss of the last step over the ranks."""
        self.spike = False
        """The last step was skipped because its loss or its gradient norm was a spike."""
        self.nonfinite = torch.zeros((), device=world.device)
        """1 after the first update that left a non-finite weight or moment in this rank's partition."""
        self.broken = False
        """Value of `nonfinite` on the host, after the last step."""

    def __call__(self, closure: None = None) -> None:
        zero = self.zero
        zero.micro_step_id = -1
        grads = [list(self.gradients.of(group)) for group in range(len(zero.bit16_groups))]
        sums = torch.stack([grad_norm_squared([grad for group in grads for _, grad in group]), self.loss])
        if self.world.size > 1:
            dist.all_reduce(sums)
        self.loss.zero_()
        norm_squared, loss = sums
        scale = float(zero.loss_scale)
        grad_scale, found_inf, norm = unscale_and_clip(norm_squared, loss_scale=scale, max_norm=self.clip or None)
        spike = self.spikes.judge(loss=loss, norm=norm) if self.spikes else torch.zeros_like(found_inf)
        skip = found_inf + spike
        self._update(grads, grad_scale, skip)
        if self.average:
            self.average.update(skip)
        del grads
        self.gradients.clear()
        self._gather_weights()
        # This is the first wait for the device: the update above is already queued.
        known = torch.stack([found_inf, spike, norm, self.nonfinite, loss]).tolist()
        overflow, spiked, unscaled, nonfinite, self.mean_loss = known
        self.spike, zero.overflow, self.broken = spiked > 0, overflow > 0, nonfinite > 0
        zero._global_grad_norm = float("inf") if zero.overflow else unscaled
        zero._update_scale(zero.overflow)

    def _update(self, grads: list[list[tuple[int, Tensor]]], grad_scale: Tensor, found_inf: Tensor) -> None:
        zero = self.zero
        for group, options in enumerate(zero.optimizer.param_groups):
            master = zero.single_partition_of_fp32_groups[group]
            weights = zero.parallel_partitioned_bit16_groups[group][self.world.rank]
            state = zero.optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                state |= {name: torch.zeros_like(master) for name in moments(options)}
            scalars = {"grad_scale": grad_scale, "found_inf": found_inf, "nonfinite": self.nonfinite}
            if self.muon and options.get("muon"):
                self.muon(grads[group], weights.data, master.data, state, options, **scalars)
                continue
            flat = (weights.data, state["exp_avg"], state["exp_avg_sq"], master.data)
            params, exp_avgs, exp_avg_sqs, masters = (
                [x.narrow(0, at, grad.numel()) for at, grad in grads[group]] for x in flat
            )
            adam_step_(
                params,
                [grad for _, grad in grads[group]],
                exp_avgs,
                exp_avg_sqs,
                masters,
                step=state["step"],
                lr=options["lr"],
                betas=options["betas"],
                eps=options["eps"],
                weight_decay=options["weight_decay"],
                **scalars,
            )

    @torch.no_grad()
    def replace_weights(self, parts: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Write other weights, in any float dtype, into this rank's `parts` of the model, and send them to all."""
        for part, other in zip(parts, others, strict=True):
            part.copy_(other)
        self._gather_weights()

    def _gather_weights(self) -> None:
        """Send every rank's updated part to all ranks. With one rank, the weights are already in place."""
        # Autograd does not see writes through the flat buffers: a graph that still needs the old weights must raise.
        increment_version([p for group in self.zero.bit16_groups for p in group])
        if self.world.size == 1:
            return
        zero = self.zero
        if sends_directly(self.world):
            gather(zero.parallel_partitioned_bit16_groups, self.world)
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )


def _require_internals(zero: Any, world: World) -> None:
    """Raise RuntimeError if this DeepSpeed lacks one of `INTERNALS`."""
    missing = [name for name in INTERNALS if not hasattr(zero, name)]
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed(world.device.type).__version__}'s ZeRO-2 optimizer has no {', '.join(missing)}; "
            "install deepspeed>=0.19.8,<0.20, or use --zero-step deepspeed"
        )

"""Forward and backward of a micro-batch as one CUDA graph, which the host starts with a single launch.

A graph replays the same kernels on the same addresses. So a micro-batch is copied into tensors that stay where they
are, the loss scale is read from the device, and gradients are summed in tensors that outlive the replay. Neither
DeepSpeed's engine nor hooks take part: autograd returns the gradients, and DeepSpeed gets their sums after the last
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import MachineError, UsageError
from .deferred_gradients import reduces_once
from .distributed import World
from .options import Options
from .parameters import trained_weights

WARM_UP = 3
"""Runs before the capture, in which Triton compiles, libraries allocate workspaces, and autograd starts its threads."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function some times, then returns what repeats its work on the device."""


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what `run` launches on the current GPU; returns the graph's replay.

    Raises MachineError if `run` does what a graph cannot hold, for instance wait for the device.
    """
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)  # a warm-up must not run on the default stream, whose lazy set-up no capture can contain
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            run()
    here.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        # Threads that save a checkpoint or watch NCCL may call CUDA meanwhile: only this thread's calls are judged.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MachineError(
            f"--cuda-graphs: forward and backward cannot be captured here ({str(error).splitlines()[0]}); "
            "train without --cuda-graphs"
        ) from error
    return graph.replay


def check(options: Options, world: World, accumulation: int) -> None:
    """Raise UsageError if --cuda-graphs does not fit the device, or how often gradients are reduced."""
    if not options.cuda_graphs:
        return
    _require_gpu(world)
    if world.size > 1 and accumulation > 1 and not reduces_once(options, world, accumulation):
        raise UsageError(
            f"--cuda-graphs reduces the gradients of {world.size} ranks once per step, and --reduce-gradients "
            f"{options.reduce_gradients} reduces them after each of {accumulation} micro-batches here; use "
            "--reduce-gradients step, which takes 4 bytes per parameter on each rank, or leave out --cuda-graphs"
        )


def _require_gpu(world: World) -> None:
    if world.device.type != "cuda":
        raise UsageError("--cuda-graphs: this run trains on the CPU, which has no CUDA graphs; leave the option out")


class CapturedMicroBatch:
    """Captures forward and backward of the first micro-batch, and replays them for every micro-batch.

    model: called as model(input_ids, labels).loss. loss: scalar, to which every micro-batch adds its part of the step's
    mean loss over all micro-batches of all ranks. accumulation: micro-batches per step on this rank; several are summed
    in fp32, the gradients of a single one stay in the graph's memory.
    """

    def __init__(self, model: nn.Module, loss: Tensor, world: World, accumulation: int, capture: Capture) -> None:
        self._model, self._loss, self._accumulation, self._capture = model, loss, accumulation, capture
        self._parts = accumulation * world.size
        self._parameters = list(trained_weights(model).values())
        self._scale = torch.ones((), device=world.device)
        """The loss scale, which each replay reads."""
        self._inputs: tuple[Tensor, ...] = ()
        """input_ids and labels, which each replay reads: int64 (batch, sequence_length)."""
        self._replay: Callable[[], None] | None = None
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """The scaled gradients of the step's micro-batches so far, summed; the next step overwrites them."""
        if accumulation > 1:
            self.gradients = {p: torch.zeros_like(p, dtype=torch.float32) for p in self._parameters}

    def __call__(self, batch: Batch, loss_scale: float, *, first: bool) -> None:
        """Run forward and backward of a micro-batch in host memory.

        loss_scale: of the whole step. first: the micro-batch is its step's first one, which sets the scale.
        Raises ValueError if the batch has another shape than the one that was captured.
        """
        self._read(batch)
        if self._replay is None:
            self._replay = self._capture(self._run)
            self._loss.zero_()  # the runs before the capture have added to it
        if first:
            self._begin_step(loss_scale)
        self._replay()

    def _begin_step(self, loss_scale: float) -> None:
        self._scale.fill_(loss_scale)
        if self._accumulation > 1:
            torch._foreach_zero_(list(self.gradients.values()))

    def _read(self, batch: Batch) -> None:
        """Copy a batch to where replays read it. From page-locked memory the copy is asynchronous, see `Batch.to`."""
        arrived = batch.input_ids, batch.labels
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(tensor, device=self._scale.device) for tensor in arrived)
        for static, tensor in zip(self._inputs, arrived, strict=True):
            if tensor.shape != static.shape:
                raise ValueError(
                    f"micro-batch of {tuple(tensor.shape)} tokens: the captured CUDA graph takes {tuple(static.shape)}"
                )
            static.copy_(tensor, non_blocking=True)

    def _run(self) -> None:
        loss = self._model(*self._inputs).loss
        self._loss += loss.detach() / self._parts
        scaled = loss / self._accumulation * self._scale
        found = torch.autograd.grad(scaled, self._parameters, allow_unused=True)
        gradients = {p: gradient for p, gradient in zip(self._parameters, found, strict=True) if gradient is not None}
        if self._accumulation == 1:
            self.gradients = {parameter: gradient.contiguous() for parameter, gradient in gradients.items()}
        else:
            for parameter, gradient in gradients.items():
                self.gradients[parameter] += gradient

"""Faults to inject into a process of `trainer_processes`: functions called with (rank, given) before the trainer."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import recorded_graphs
import torch

from phi_fast.data.loader import CorpusError
from phi_fast.training import checkpoint, cuda_graphs
from phi_fast.training.corpora import Corpora
from phi_fast.training.flat_gradients import FlatGradients
from phi_fast.training.local_gradients import LocalGradients
from phi_fast.training.metrics import MetricsLog
from phi_fast.training.task_scores import TasksDuringTraining
from phi_fast.training.zero import Zero2

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir")


def set_environment(rank: int, given: dict[str, str]) -> None:
    """Set environment variables."""
    os.environ.update(given)


def die_at_file_operation(rank: int, given: list[int]) -> None:
    """Kill this rank before its given[rank]-th operation on a file or folder in checkpoints/; 0: never."""
    left = given[rank]

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        # Inside rmtree, paths are relative to an open folder, and only checkpoints are removed.
        if event in FILE_EVENTS and ("checkpoints" in str(details[0]) or event in ("os.remove", "os.rmdir")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if left:
        sys.addaudithook(count)


def die_at_step(rank: int, given: list[int]) -> None:
    """Kill this rank before step given[rank] (from 1); 0: never."""
    _at_step(given[rank], lambda zero: os.kill(os.getpid(), signal.SIGKILL))


def freeze_at_step(rank: int, given: list[int]) -> None:
    """Stop this rank by SIGSTOP before step given[rank] (from 1); 0: never."""
    _at_step(given[rank], lambda zero: os.kill(os.getpid(), signal.SIGSTOP))


def signal_in_validation(rank: int, given: list[int]) -> None:
    """Send SIGTERM to this rank, if given[rank], before its second batch of validation rows."""
    validation = Corpora.validation

    def validate(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(validation(*arguments)):
            if number == 1 and given[rank]:
                os.kill(os.getpid(), signal.SIGTERM)
            if number > 1 and given[rank]:
                print("went on validating", flush=True)
            yield batch

    Corpora.validation = validate  # type: ignore[method-assign]


def no_corpora(rank: int, given: list[int]) -> None:
    """Hide the corpora from this rank, if given[rank]."""
    exists = Path.exists
    if given[rank]:
        Path.exists = lambda path: path.name != "manifest.json" and exists(path)  # type: ignore[method-assign]


def full_disk(rank: int, given: list[int]) -> None:
    """Limit this rank's files to given[rank] bytes; 0: no limit."""
    if given[rank]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (given[rank], given[rank]))


def slow_disk(rank: int, given: list[float]) -> None:
    """Delay each fsync of this rank by given[rank] seconds."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(given[rank])
        fsync(descriptor)

    os.fsync = slow


def nan_weights_at_step(rank: int, given: list[int]) -> None:
    """Make one weight of this rank infinite before step given[rank] (from 1); 0: never."""

    def poison(zero: Zero2) -> None:
        with torch.no_grad():
            zero.model.get_parameter("layers.0.out_proj.bias_mlp")[3] = float("inf")

    _at_step(given[rank], poison)


def overflow_at_steps(rank: int, given: list[int]) -> None:
    """Let the gradients of the steps in `given` (from 1) overflow on rank 0."""
    backward = Zero2.backward
    taken = 0

    def inject(zero: Zero2, loss: torch.Tensor) -> None:
        nonlocal taken
        taken += 1
        if taken in given and rank == 0:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        backward(zero, loss)

    Zero2.backward = inject  # type: ignore[method-assign]


def _at_step(step: int, action: Callable[[Zero2], None]) -> None:
    loss = Zero2.loss
    taken = 0

    def count(zero: Zero2, *arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == step:
            action(zero)
        return loss(zero, *arguments)

    Zero2.loss = count  # type: ignore[method-assign]


def multiply_loss_at_steps(rank: int, given: list[int]) -> None:
    """Multiply the losses of the steps in `given` (from 1) by 5 on rank 0."""
    loss = Zero2.loss
    taken = 0

    def inject(zero: Zero2, *arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return loss(zero, *arguments) * (5 if taken in given and rank == 0 else 1)

    Zero2.loss = inject  # type: ignore[method-assign]


def multiply_gradients_at_steps(rank: int, given: list[int]) -> None:
    """Multiply the gradients, and not the losses, of the steps in `given` (from 1) by 50 on rank 0."""
    loss = Zero2.loss
    taken = 0

    def inject(zero: Zero2, *arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        value = loss(zero, *arguments)
        return value + 49 * (value - value.detach()) if taken in given and rank == 0 else value

    Zero2.loss = inject  # type: ignore[method-assign]


def sleep_on(rank: int, given: list[float]) -> None:
    """Let this rank sleep given[rank] seconds before it begins."""
    time.sleep(given[rank])


def environment(rank: int, given: dict[str, str]) -> None:
    """Set environment variables for the trainer."""
    os.environ.update(given)


def broken_validation(rank: int, given: list[int]) -> None:
    """Make this rank fail to read rows in its given[rank]-th validation (from 1); 0: never."""
    validation, done = Corpora.validation, 0

    def fail(*arguments: Any) -> Iterator[Any]:
        nonlocal done
        done += 1
        if done == given[rank]:
            raise CorpusError("validation.bin was cut short while in use")
        return validation(*arguments)

    Corpora.validation = fail  # type: ignore[method-assign]


def broken_task(rank: int, given: list[int]) -> None:
    """Make this rank fail in its given[rank]-th scoring of the tasks (from 1); 0: never."""
    score, done = TasksDuringTraining._score, 0

    def fail(tasks: TasksDuringTraining, model: Any) -> dict[str, float]:
        nonlocal done
        done += 1
        if done == given[rank]:
            raise RuntimeError("no such thing")
        return score(tasks, model)

    TasksDuringTraining._score = fail  # type: ignore[method-assign]


def no_room_for_metrics(rank: int, given: list[int]) -> None:
    """Write rank 0's records to a full device, /dev/full, from the given[0]-th on."""
    write, done = MetricsLog.write, 0

    def fill(log: MetricsLog, record: Any) -> None:
        nonlocal done
        done += 1
        if done == given[0]:
            log._file = Path("/dev/full").open("w")  # noqa: SIM115
        write(log, record)

    MetricsLog.write = fill  # type: ignore[method-assign]


def graphs_on_a_cpu(rank: int, given: list[str]) -> None:
    """Make --cuda-graphs work on a CPU, with given[rank] of `recorded_graphs` as the capture."""
    cuda_graphs.capture = getattr(recorded_graphs, given[rank])
    cuda_graphs._require_gpu = lambda world: None


def slow_read(rank: int, given: list[float]) -> None:
    """Delay the reading of a checkpoint's weights by given[rank] seconds."""
    load = checkpoint.load_model

    def wait(source: Path) -> Any:
        print("reading the checkpoint", flush=True)
        time.sleep(given[rank])
        return load(source)

    checkpoint.load_model = wait


def full_file_system(rank: int, given: list[int]) -> None:
    """Report given[rank] free bytes on the run directory's file system."""
    shutil.disk_usage = lambda path: SimpleNamespace(total=2**40, used=2**40 - given[rank], free=given[rank])


def known_gradients(rank: int, given: None) -> None:
    """Replace each gradient by one that depends only on the parameter's shape and the step, in 8 significant bits, so
    that the mean over any number of ranks is exact."""
    steps: dict[torch.nn.Parameter, int] = {}
    for kind in (FlatGradients, LocalGradients):

        def take(self: Any, parameter: torch.nn.Parameter, take: Callable[..., None] = kind._take) -> None:
            steps[parameter] = steps.get(parameter, 0) + 1
            draw = torch.Generator().manual_seed(1000 * steps[parameter] + parameter.numel() % 997)
            parameter.grad = torch.randn(parameter.shape, generator=draw).bfloat16().to(parameter.dtype)
            take(self, parameter)

        kind._take = take  # type: ignore[method-assign]

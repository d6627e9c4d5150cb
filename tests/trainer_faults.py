"""Faults that a trainer process of `trainer_processes` is started with: each is called with (rank, given) before it."""

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

import torch

from phi_fast.data.loader import CorpusError
from phi_fast.training import checkpoint
from phi_fast.training.corpora import Corpora
from phi_fast.training.metrics import MetricsLog
from phi_fast.training.task_scores import TasksDuringTraining
from phi_fast.training.zero import Zero2

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir")


def die_at_file_operation(rank: int, given: list[int]) -> None:
    """kill -9 before this rank's given[rank]-th operation on a file or folder below checkpoints/; 0: never."""
    left = given[rank]

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        # Inside rmtree, paths are relative to an open folder; nothing but checkpoints is removed.
        if event in FILE_EVENTS and ("checkpoints" in str(details[0]) or event in ("os.remove", "os.rmdir")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if left:
        sys.addaudithook(count)


def die_at_step(rank: int, given: list[int]) -> None:
    """kill -9 when this rank is about to take step given[rank] (from 1); 0: never."""
    _at_step(given[rank], lambda zero: os.kill(os.getpid(), signal.SIGKILL))


def freeze_at_step(rank: int, given: list[int]) -> None:
    """SIGSTOP when this rank is about to take step given[rank] (from 1); 0: never."""
    _at_step(given[rank], lambda zero: os.kill(os.getpid(), signal.SIGSTOP))


def signal_in_validation(rank: int, given: list[int]) -> None:
    """SIGTERM to this rank, where given[rank], as it comes to its second batch of validation rows."""
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
    """Where given[rank], the corpora are not on this rank's machine."""
    exists = Path.exists
    if given[rank]:
        Path.exists = lambda path: path.name != "manifest.json" and exists(path)  # type: ignore[method-assign]


def full_disk(rank: int, given: list[int]) -> None:
    """No file of this rank can grow beyond given[rank] bytes; 0: no limit."""
    if given[rank]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (given[rank], given[rank]))


def slow_disk(rank: int, given: list[float]) -> None:
    """Each fsync of this rank takes given[rank] seconds."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(given[rank])
        fsync(descriptor)

    os.fsync = slow


def nan_weights_at_step(rank: int, given: list[int]) -> None:
    """One weight of this rank becomes infinite before step given[rank] (from 1); 0: never."""

    def poison(zero: Zero2) -> None:
        with torch.no_grad():
            zero.model.get_parameter("layers.0.out_proj.bias_mlp")[3] = float("inf")

    _at_step(given[rank], poison)


def overflow_at_steps(rank: int, given: list[int]) -> None:
    """The gradients of the steps in given (from 1) overflow, on rank 0."""
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
    """The losses of the steps in given (from 1) are 5 times what they are, on rank 0."""
    loss = Zero2.loss
    taken = 0

    def inject(zero: Zero2, *arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return loss(zero, *arguments) * (5 if taken in given and rank == 0 else 1)

    Zero2.loss = inject  # type: ignore[method-assign]


def sleep_on(rank: int, given: list[float]) -> None:
    """This rank sleeps given[rank] seconds before it begins."""
    time.sleep(given[rank])


def environment(rank: int, given: dict[str, str]) -> None:
    """Variables of the environment that the trainer finds."""
    os.environ.update(given)


def broken_validation(rank: int, given: list[int]) -> None:
    """Reading validation rows fails on this rank in its given[rank]-th validation (from 1); 0: never."""
    validation, done = Corpora.validation, 0

    def fail(*arguments: Any) -> Iterator[Any]:
        nonlocal done
        done += 1
        if done == given[rank]:
            raise CorpusError("validation.bin was cut short while in use")
        return validation(*arguments)

    Corpora.validation = fail  # type: ignore[method-assign]


def broken_task(rank: int, given: list[int]) -> None:
    """Scoring the tasks fails for the given[rank]-th time on this rank (from 1); 0: never."""
    score, done = TasksDuringTraining._score, 0

    def fail(tasks: TasksDuringTraining, model: Any) -> dict[str, float]:
        nonlocal done
        done += 1
        if done == given[rank]:
            raise RuntimeError("no such thing")
        return score(tasks, model)

    TasksDuringTraining._score = fail  # type: ignore[method-assign]


def no_room_for_metrics(rank: int, given: list[int]) -> None:
    """From rank 0's given[0]-th record on, the device that takes its lines is full: the kernel says so."""
    write, done = MetricsLog.write, 0

    def fill(log: MetricsLog, record: Any) -> None:
        nonlocal done
        done += 1
        if done == given[0]:
            log._file = Path("/dev/full").open("w")  # noqa: SIM115
        write(log, record)

    MetricsLog.write = fill  # type: ignore[method-assign]


def slow_read(rank: int, given: list[float]) -> None:
    """Reading a checkpoint's weights takes given[rank] seconds more."""
    load = checkpoint.load_model

    def wait(source: Path) -> Any:
        print("reading the checkpoint", flush=True)
        time.sleep(given[rank])
        return load(source)

    checkpoint.load_model = wait


def full_file_system(rank: int, given: list[int]) -> None:
    """The run directory's file system has given[rank] bytes left."""
    shutil.disk_usage = lambda path: SimpleNamespace(total=2**40, used=2**40 - given[rank], free=given[rank])

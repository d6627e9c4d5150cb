"""Trainer processes that start in a fraction of a second, as forks of a server that has imported everything once.

The server has no threads, no process group and no open files of a run, so that a fork behaves like a fresh process.
This file run as a program is the server; the functions for tests talk to it. It sees no GPU: one GPU has no room for
several ranks, so they run on CPUs everywhere.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers, trainers

from phi_fast import train
from phi_fast.data import stdlib_corpus, vocabulary
from phi_fast.training.distributed import deepspeed, leave

TINY = {
    "model.vocab-size": 320,
    "model.hidden-size": 64,
    "model.num-attention-heads": 1,
    "model.num-hidden-layers": 1,
    "sequence-length": 16,
    "global-batch-size": 4,
    "sample-tokens": 0,
    "val-every": 0,
    "precision": "fp32",
    "device": "cpu",
}


def make_corpora(folder: Path) -> Path:
    """Make two corpora of random sentences, "docs" and "code", in bytes: a few thousand rows of 16 tokens."""
    bytes_only = vocabulary.byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=[vocabulary.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_only.train_from_iterator([], trainer)
    folder.mkdir(parents=True)
    bytes_only.save(str(folder / "tokenizer.json"))
    words = random.Random(5)
    for name in ("docs", "code"):
        documents = [" ".join(words.choices(["if", "x", "is", "not", "y", "then", "z"], k=40)) for _ in range(200)]
        stdlib_corpus._write_component(folder / name, documents, bytes_only)
    return folder


def arguments(data: Path, run: Path, steps: int, **changes: Any) -> list[str]:
    """Make the command line of a tiny run of `steps` steps; keywords are options with _ for -."""
    options: dict[str, Any] = {**TINY, "data": data, "tokenizer": data / "tokenizer.json", "run-dir": run}
    options["tokens"] = steps * 4 * 16
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


class Trainer:
    """A running rank, whose output goes to a file."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output
        self._status: int | None = None

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    @property
    def status(self) -> int | None:
        """None while it runs, then its exit status, or minus the number of the signal that ended it."""
        if self._status is None:
            self._status = _ask({"poll": self.pid})
        return self._status

    def wait(self, timeout: float = 120) -> int:
        """Return the exit status; after `timeout` seconds, kill the process and raise TimeoutError."""
        deadline = time.monotonic() + timeout
        while self.status is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s:\n{self.output}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def signal(self, number: signal.Signals) -> None:
        if self.status is None:
            os.kill(self.pid, number)


def start(words: list[str], folder: Path, *, ranks: int = 1, fault: str = "", given: Any = None) -> list[Trainer]:
    """Start `ranks` processes of the trainer, with their output in `folder`.

    fault: a function of `trainer_faults`, called first in each process with (rank, given).
    """
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    for rank in range(ranks):
        output = folder / f"rank-{rank}.txt"
        output.write_text("")
        environment = _environment(rank, ranks, port) if ranks > 1 else {}
        request = {"words": words, "output": str(output), "environment": environment}
        running.append(Trainer(_ask(request | {"fault": fault, "rank": rank, "given": given}), output))
    return running


def finish(
    words: list[str], folder: Path, *, ranks: int = 1, expect: int = 0, timeout: float = 120, **options: Any
) -> str:
    """Run to the end, each rank within `timeout` seconds, and return rank 0's output.

    Asserts that every rank's exit status is `expect`.
    """
    started = start(words, folder, ranks=ranks, **options)
    statuses = [trainer.wait(timeout) for trainer in started]
    assert statuses == [expect] * ranks, "\n".join(trainer.output for trainer in started)
    return started[0].output


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["step"]]  # step 0 is the validation before the first


def latest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run) / "model.safetensors")


def optimizer_state(run: Path) -> dict[str, torch.Tensor]:
    """Load the optimizer's tensors of a run with one rank."""
    return load_file(latest(run) / "rank-0-of-1.safetensors")


def until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def without_launcher() -> dict[str, str]:
    """Copy the environment without a launcher's variables, which a trainer in this process sets, too."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


_server: subprocess.Popen[str] | None = None


def _ask(request: dict[str, Any]) -> Any:
    global _server
    if _server is None:
        environment = without_launcher()
        pipe = subprocess.PIPE
        _server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    assert _server.stdin
    assert _server.stdout
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return json.loads(_server.stdout.readline())


def _serve() -> None:
    """Answer requests until the tests' end of the pipe is closed; then end what still runs."""
    deepspeed("cpu")
    # Modules that a first run would import late: torch._dynamo and Inductor (through DeepSpeed's Muon), TensorBoard.
    for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "torch.utils.tensorboard"):
        importlib.import_module(name)
    importlib.import_module("trainer_faults")
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            if pid:
                running.discard(pid)
        else:
            answer = os.fork()
            if answer == 0:
                _train(request)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _train(request: dict[str, Any]) -> None:
    """The child: never returns."""
    descriptor = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.update(request["environment"])
    status = 1
    try:
        if request["fault"]:
            getattr(importlib.import_module("trainer_faults"), request["fault"])(request["rank"], request["given"])
        status = train.main(request["words"])
        leave()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    _serve()

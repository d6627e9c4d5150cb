"""Processes and devices: one process without a launcher, many under torchrun, deepspeed or Slurm.

DeepSpeed is imported only through `deepspeed()`, because three things must be set before its first import: the
accelerator (a CPU that may train in fp16 and compiles nothing at start), its log level, and the environment of a single
process (without it DeepSpeed looks for MPI).
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import INTERRUPTED, PhiFastError, UsageError
from ..kernels import keep_freed_memory


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The process group for the methods below; None: the default group."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes metrics."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's `value`, a small picklable object, to every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Collect a small picklable object from every rank; every rank gets the list, in order of rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box


RESOLVE_SECONDS = 30.0
"""How long to wait until MASTER_ADDR resolves to an address."""


class LostRank(PhiFastError, RuntimeError):
    """A rank died, hung, or never started; the message says what to do."""

    status = INTERRUPTED
    one_rank = True


def join(device: Literal["auto", "cpu", "cuda"] = "auto", timeout: float = 600.0) -> World:
    """Join the launcher's process group, or make one for a single process.

    timeout: seconds that a rank waits for the others, here and in every later collective, before it fails.
    Raises UsageError if `device` is "cuda" and no GPU is visible, if this machine has more ranks than GPUs, or if some
    of a launcher's variables are missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, size, local_rank, local_size = _place()
    if kind == "cuda":
        _check_gpus(max(local_size, local_rank + 1))
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
        if size > 1:
            # torchrun gives every rank one thread, other launchers one per core: divide the cores among the ranks.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    module = deepspeed(kind)
    if not dist.is_initialized():
        # DeepSpeed makes more groups later without a timeout: they would take these defaults of up to half an hour.
        limit = datetime.timedelta(seconds=timeout)
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
        # torchrun restarts ranks with the store of the ranks that died: their addresses must not be found in it.
        store = _meet(rank, size, limit)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if kind == "cuda" else "gloo"
        own = torch.device(kind, local_rank) if kind == "cuda" and size > 1 else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=own)
        module.init_distributed(backend, auto_mpi_discovery=False, timeout=limit)
    return World(rank, size, local_rank, torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu"))


def _check_gpus(ranks: int) -> None:
    """Raises UsageError, on every rank alike, where this machine has fewer GPUs than ranks."""
    if ranks > (gpus := torch.cuda.device_count()):
        raise UsageError(
            f"{ranks} ranks on this machine, and torch sees {gpus} GPU{'s' * (gpus != 1)} here: each rank needs one. "
            f"Start {gpus} (--nproc_per_node {gpus}), or train with --device cpu"
        )


def _place() -> tuple[int, int, int, int]:
    """Read (rank, ranks, rank on this machine, ranks on this machine) from the launcher's environment.

    Without a launcher the environment is set up for one process. Raises UsageError if a variable is missing, is not a
    number, or contradicts another.
    """
    if "RANK" not in os.environ:
        alone = {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        left = {name: os.environ[name] for name, one in alone.items() if os.environ.get(name, one) != one}
        if left:
            found = " and ".join(f"{name}={value}" for name, value in left.items())
            raise UsageError(
                f"{found} is set, but not RANK: a launcher sets them all (docs/at-scale.md). Set RANK, or unset "
                f"{' and '.join(left)} to train in one process"
            )
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"RANK={os.environ['RANK']} is set, but not {', '.join(missing)}: a launcher sets them all "
            "(docs/at-scale.md); unset RANK to train in one process"
        )
    size = _number("WORLD_SIZE", 1, 2**20)
    rank = _number("RANK", 0, size - 1)
    _number("MASTER_PORT", 0, 65535)
    local_size = _number("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE", 1, size, default=1)
    return rank, size, _number("LOCAL_RANK", 0, 2**20, default=0), local_size


def _number(name: str, least: int, most: int, *, default: int | None = None) -> int:
    """Read a launcher's variable. Raises UsageError unless it is an integer in [least, most]."""
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise UsageError(
            f"{name}={text}: expected an integer from {least} to {most}, as a launcher sets it (docs/at-scale.md)"
        )
    return value


def _meet(rank: int, size: int, limit: datetime.timedelta) -> dist.Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT. Raises UsageError if the name is unknown or the port in use."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    deadline = time.monotonic() + min(RESOLVE_SECONDS, limit.total_seconds())
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"MASTER_ADDR={host} cannot be resolved on this machine ({error.strerror}): give the first "
                    "machine's address"
                ) from None
            time.sleep(0.5)  # a machine that is still starting may become known a moment later
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UsageError(
            f"MASTER_PORT={port} is in use on this machine by another program: give a free one (torchrun --standalone "
            "finds one by itself)"
        ) from error
    return store


def lost_rank(error: Exception) -> LostRank | None:
    """Return the LostRank error for a failed collective, or None if `error` comes from something else."""
    if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    return LostRank(
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} lost the others ({reason}): a process died, or "
        "hung longer than --rank-timeout; its own output, or the kernel's log, tells why. Start all ranks again with "
        "--resume"
    )


def leave() -> None:
    """Leave the process group at the end of the process; DeepSpeed keeps a reference and cannot join another."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed(kind: str) -> ModuleType:
    """Import DeepSpeed quietly, for "cuda" or "cpu"."""
    os.environ.setdefault("DS_ACCELERATOR", kind)
    warnings.filterwarnings("ignore", module=r"deepspeed(\..*)?|torch\.(jit|distributed)(\..*)?")
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    import deepspeed as module

    if kind == "cpu":
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        class QuietCPU(CPU_Accelerator):
            """A CPU accelerator that allows fp16 (torch computes it, slowly) and compiles no op at the first start."""

            def is_fp16_supported(self) -> bool:
                return True

            def create_op_builder(self, op_name: str) -> None:
                # DeepSpeed only asks for the shared-memory all-reduce: 54 s of g++ at first use, and gloo replaces it.
                return None

        set_accelerator(QuietCPU())
    return module


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

"""What a reader must know of the GPU, asked in a process of its own: the parent of the stages must not touch it."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import machine
from phi_fast.errors import UsageError

_QUERIED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
_NOW = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "memory.used")
"""Fields of nvidia-smi: of the card, and of the moment."""


def describe(dry: bool) -> dict[str, Any]:
    """`machine.describe_machine` and, under "gpu", the GPU's own figures; "gpu" is None where torch sees none.

    Raises UsageError where the question itself ends the process, as a broken driver does.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_ask, args=(sender, dry))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise UsageError("torch ended while it looked for a GPU (its words are above): is the driver whole?") from None
    finally:
        process.join()


def _ask(sender: Connection, dry: bool) -> None:
    sender.send(machine.describe_machine() | {"gpu": None if dry or not torch.cuda.is_available() else _gpu()})


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "GPUs": torch.cuda.device_count(),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory MB": properties.total_memory >> 20,
        "L2 MB": properties.L2_cache_size >> 20,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        **smi(_QUERIED),
    }


def clocks() -> dict[str, str]:
    """Clocks, temperature and power of this moment: a throttled card shows here."""
    return smi(_NOW)


def smi(fields: tuple[str, ...]) -> dict[str, str]:
    """Fields of nvidia-smi for the first GPU; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}

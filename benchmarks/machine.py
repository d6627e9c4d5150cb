"""The description of the machine that goes with each figure: device, threads, instruction set, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from phi_fast._C import cpu

PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "liger-kernel", "litgpt", "flash-attn", "megatron-core", "grain"),
    *("numpy", "tokenizers", "cut-cross-entropy"),
)


def describe_machine() -> dict[str, Any]:
    """Device, threads, instruction sets, Python, and the versions of every package that is measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    threads = torch.get_num_threads()
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{_cpu_name()} {threads} threads",
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": cpu.isa(),
        "python": platform.python_version(),
        "versions": versions,
    }


def slug(machine: dict[str, Any]) -> str:
    """The device's name in a form that suits a file name."""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def commit() -> str:
    """Short hash of the measured source, with "+" if it has uncommitted changes; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*: (.*)", info.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()

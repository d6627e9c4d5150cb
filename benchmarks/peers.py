"""Other implementations: which of them can run here, and for each that cannot, one line that says why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch

from phi_fast.kernels import BackendUnavailable, backend

Made = TypeVar("Made")

INSTALL = {
    "liger_kernel": "make bench installs it, or: pip install liger-kernel",
    "litgpt": "make bench installs it, or: pip install --no-deps litgpt, and lightning",
    "megatron": "make bench installs it, or: pip install megatron-core",
    "grain": "make bench installs it, or: pip install grain",
    "cut_cross_entropy": "pip install cut-cross-entropy",
    "flash_attn": "needs a GPU and nvcc: pip install flash-attn",
    "amp_C": "NVIDIA's apex is built from its source tree on a GPU machine; PyPI's package of that name is another one",
}
"""Module -> how to get it."""

_MODULES = {"flash-attn": "flash_attn", "apex": "amp_C"}
"""Back end -> the module it needs."""

_NEED_A_GPU = {
    "liger_kernel": "its kernels are in Triton",
    "cut_cross_entropy": "its kernels are in Triton",
    "flash_attn": "it is CUDA",
    "amp_C": "it is CUDA",
}


def absent(module: str) -> str | None:
    """Why `module`'s ops cannot run here; None if they should run."""
    if importlib.util.find_spec(module) is None:
        return f"not installed: {INSTALL[module]}"
    if module in _NEED_A_GPU and not torch.cuda.is_available():
        return f"installed, but needs a GPU: {_NEED_A_GPU[module]}"
    return None


def peer(module: str, make: Callable[[], Made]) -> Made | str:
    """The result of `make`, which imports from `module`, or the reason why `module` cannot run here."""
    return absent(module) or make()


def compiled(function: Callable[..., Made], full: bool) -> Callable[..., Made] | None:
    """`function` under torch.compile; None in the small run, where compiling would take longer than everything else."""
    if not full:
        return None
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    functorch.donated_buffer = False  # a graph is run backward many times
    return torch.compile(function)


NOT_COMPILED = "compiled in the full run only"


def backends(op: str, device: torch.device) -> dict[str, str]:
    """Row name -> back end of this project that can run `op` on `device`, the default first, without the reference.

    Other libraries' kernels behind this project's interface get a peer's name, so that their failures do not count as
    this project's.
    """
    names = dict.fromkeys([backend.name(op, device), *backend.BACKENDS, *backend.VENDORS])
    found = {}
    for name in names:
        vendor = name in backend.VENDORS
        if name == "reference" or (vendor and op not in backend.VENDORS[name]):
            continue
        if (name == "triton" and device.type == "cpu") or absent(_MODULES.get(name, "torch")):
            continue
        try:
            with backend.use(name, op=op):
                backend.implementation(op, device)
        except BackendUnavailable:
            continue
        found[f"{name} through phi_fast" if vendor else f"phi_fast {name}"] = name
    return found

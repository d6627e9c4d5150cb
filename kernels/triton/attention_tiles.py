"""Tile sizes of the attention kernels: those chosen by hand, and the values that `phi_fast.kernels.tune` tries.

What decides by hand, in this order; `python -m phi_fast.kernels.codegen` shows each figure:
1. no register spills in 16 bits, with any mask, documents, rotation and group of heads (`--check` compiles them all).
   The rotation inside the loads costs 50 to 100 registers per thread, and with documents each thread searches them for
   the place of its keys, hence smaller tiles. fp32 with the rotation does spill (up to 500 bytes per thread);
2. two or more blocks on a multiprocessor where they fit, so that one block's softmax hides behind another's products;
3. shared memory within 99 KB for sm_80's, which consumer cards of compute capability 8.x and 12.x also run (the same
   mma.sync instructions); 227 KB for sm_90 and sm_100; 64 KB for gfx942;
4. sm_80: 32 rows per warp in the forward, since a warp reads every key from shared memory, and with 16 rows that alone
   takes as long as its tensor-core instructions. sm_90's wgmma and sm_100's tcgen05 read shared memory themselves, 64
   or 128 rows at a time, so 8 warps share a tile. gfx942 has 512 registers per lane and no asynchronous copies: stages
   is 1.
None of these tiles was timed on a GPU yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.attention import AttentionOptions, band
from .common import next_power_of_2, recorded_architecture
from .tiles import Tunable, bucket, words

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

HEAD_DIMS = (64, 80, 96, 128)
"""The head dims that the kernels take. Those that are no power of two run in tiles of the next one's columns, whose
last are neither read nor written: of 128 columns, 80 dims use 63% of each product, and 96 dims 75%."""


class Tile(NamedTuple):
    """Rows of q (m) and of k (n) per step, and how many warps and pipeline stages run them."""

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False
    """Whether the loop's tiles are fetched by tensor descriptors, where the tensors' strides allow it. (In Hopper and
    later, the tensor memory accelerator does that; Triton makes ordinary loads of them for other GPUs.)"""


class Case(NamedTuple):
    """What the measured tile of an attention kernel depends on."""

    head_dim: int
    dtype: str
    rotation: int
    """Dims of q and k that the kernel rotates."""
    mask: str
    """ "causal", "full", or "band": a window, or rows and keys of different numbers."""
    documents: bool
    group: int
    """Query heads per key head."""
    length: int
    """Keys, as a power of two (`bucket`)."""


_TRIED = {
    "m": (16, 32, 64, 128),
    "n": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "descriptors": (False, True),
}
KERNELS = {name: Tunable(f"attention.{name}", Tile, Case, _TRIED) for name in ("forward", "dq", "dkv")}
"""What the tuner may choose of each kernel."""


def case_of(q: Tensor, k: Tensor, options: AttentionOptions) -> Case:
    """What the measured tiles of a call depend on."""
    banded, *_ = mask_of(q, k, options)
    mask = "band" if banded else "causal" if options.causal else "full"
    rotation = 0 if options.cos is None else 2 * options.cos.shape[1]
    documents, group = options.cu_seqlens is not None, q.shape[2] // k.shape[2]
    return Case(q.shape[3], words(q.dtype), rotation, mask, documents, group, bucket(k.shape[1]))


def mask_of(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[bool, int, int]:
    """(banded, least, most): row i sees key j where least <= j - i <= most. Where that is not banded, the flag causal
    says the same."""
    sequence, keys = q.shape[1], k.shape[1]
    least, most = band(sequence, keys, options.causal, options.window)
    whole = most >= keys - 1 or (options.causal and most == 0)  # what the flag CAUSAL, or none, says too
    return keys != sequence or least > 1 - sequence or not whole, least, most


_HALF_PRECISION = {
    # (kernel, columns of a tile, rotary inside): a tile by architecture, in the order of ARCHITECTURES
    ("forward", 64, False): ((128, 32, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 1)),
    ("forward", 64, True): ((128, 32, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 1)),
    ("forward", 128, False): ((128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 4, 1)),
    ("forward", 128, True): ((64, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 1)),
    ("dq", 64, False): ((64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 1)),
    ("dq", 64, True): ((64, 32, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 1)),
    ("dq", 128, False): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1)),
    ("dq", 128, True): ((64, 32, 8, 3), (64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1)),
    ("dkv", 64, False): ((32, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 1)),
    ("dkv", 64, True): ((32, 32, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 1)),
    ("dkv", 128, False): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 32, 4, 1)),
    ("dkv", 128, True): ((32, 32, 8, 2), (32, 64, 8, 2), (32, 128, 8, 2), (32, 32, 4, 1)),
}

# With documents each program searches them, and beside the rotation each thread, for the place of every key.
_DOCUMENTS = {
    # (kernel, columns of a tile or one head_dim, rotary inside, architecture): a tile in the place of the one above
    ("forward", 64, False, "sm_100"): (128, 32, 8, 3),
    ("forward", 64, True, "sm_100"): (128, 32, 8, 3),
    ("dq", 64, True, "sm_80"): (64, 16, 4, 2),
    ("dq", 64, True, "sm_100"): (128, 32, 4, 2),
    ("dq", 128, True, "sm_90"): (64, 16, 8, 2),
    ("dkv", 64, True, "sm_80"): (64, 16, 4, 2),
    ("dkv", 64, False, "sm_90"): (32, 128, 8, 2),
    ("dkv", 128, False, "sm_90"): (32, 64, 8, 2),
    ("dkv", 128, True, "sm_90"): (32, 32, 8, 2),
    ("dkv", 128, False, "sm_100"): (64, 64, 8, 2),
    ("dkv", 128, True, "sm_100"): (64, 64, 8, 2),
    # Masked columns take a few registers more: Triton 3.6 spilled 64 bytes of them.
    ("dkv", 80, True, "sm_100"): (32, 32, 8, 2),
    ("dkv", 96, True, "sm_100"): (32, 32, 8, 2),
}

# fp32 operands take twice the room, and without TF32 the products run on the ordinary units from registers.
_SINGLE_PRECISION = {64: (32, 32, 4, 2), 128: (16, 16, 4, 1)}


def tile(kernel: str, architecture: str, head_dim: int, itemsize: int, rotary: bool, documents: bool) -> Tile:
    """The tile of `kernel` ("forward", "dq" or "dkv") for elements of `itemsize` bytes."""
    width = next_power_of_2(head_dim)
    if itemsize == 4:
        return Tile(*_SINGLE_PRECISION[width])
    usual = _HALF_PRECISION[kernel, width, rotary][ARCHITECTURES.index(architecture)]
    if documents:
        usual = _DOCUMENTS.get((kernel, width, rotary, architecture), usual)
        usual = _DOCUMENTS.get((kernel, head_dim, rotary, architecture), usual)
    return Tile(*usual)


def architecture(device: torch.device) -> str:
    """The member of ARCHITECTURES whose tiles suit `device`. The interpreter, on a CPU, runs sm_80's; for meta tensors
    it is the one whose launches are recorded."""
    return recorded_architecture() if device.type == "meta" else _architecture(device)


@lru_cache
def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")

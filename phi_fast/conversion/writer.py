"""Writes safetensors files one tensor at a time: first the header, from the shapes, then each tensor.

The format is 8 bytes of header length (little endian), a JSON header with each tensor's dtype, shape and byte range,
and the tensors end to end (https://github.com/huggingface/safetensors). `safetensors.torch.save_file` needs all tensors
in memory at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .tensor_files import FLOATS

DTYPES = {dtype: name for name, dtype in FLOATS.items()}
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write(
    folder: Path, entries: list[Entry], read: Callable[[str], Tensor], max_shard_bytes: int, stem: str = "model"
) -> list[Path]:
    """Write `stem`.safetensors, or shards and an index if the total exceeds `max_shard_bytes`. Returns the files.

    `read(name)` is called for each tensor when it is written. Raises ValueError for a dtype that is not one of
    `DTYPES`, or a tensor that differs from its entry.
    """
    shards = _shards(entries, max_shard_bytes)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, read)
    paths = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": weight_map}
        paths.append(folder / f"{stem}.safetensors.index.json")
        paths[-1].write_text(json.dumps(index, indent=2), encoding="utf-8")
    return paths


def _shards(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Consecutive entries, grouped up to the limit; a tensor above the limit gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_file(path: Path, entries: list[Entry], read: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.name} is {entry.dtype}; safetensors of weights are {', '.join(DTYPES.values())}")
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            tensor = read(entry.name)
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                raise ValueError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry}")
            tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(file)

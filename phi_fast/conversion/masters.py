"""Reads the fp32 weights of a checkpoint: the optimizer's own, from which its 16-bit weights were rounded, or their
moving average (`--ema-decay`).

Each rank's file holds its part of every parameter group, flattened and joined end to end: first Muon's matrices, if
there are any, then the parameters with weight decay, then the others (`model.matrices`), each group in the model's
order. All parts have the same length; the last one is padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model.matrices import parameter_group
from ..model.phi import Phi
from ..model.reference import ReferencePhi
from . import inside
from .errors import ConversionError
from .source import Source
from .tensor_files import Header, SafetensorsFile, TensorFile


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in its group."""

    name: str
    """Name of the flat tensor: "master.0"."""
    start: int
    shape: tuple[int, ...]


class Masters:
    """A `TensorFile` with a checkpoint's weights in fp32, under the names in its model.safetensors."""

    def __init__(self, places: Mapping[str, _Place], shards: list[SafetensorsFile], length: Mapping[str, int]) -> None:
        """length: number of elements of each flat tensor in one shard."""
        self._places, self._shards, self._length = places, shards, length

    @staticmethod
    def of(source: Source, kind: str = "master") -> Masters | None:
        """The masters of a source, or, if `kind` is "ema", the averages; None if it is not a checkpoint of a run, or
        has no ranks' files.

        Raises ConversionError if the ranks' files do not fit the model.
        """
        if source.adapters:  # masters of the adapters are not masters of the weights
            return None
        state = inside.read_fields(source.folder, "state.json")
        manifest = inside.read_fields(source.folder, "manifest.json")
        if state is None or manifest is None:
            return None
        ranks = manifest.whole("world_size", least=1, most=2**20)
        if inside.find(source.folder, f"rank-0-of-{ranks}.safetensors") is None:
            return None
        shards = [SafetensorsFile(_shard(source.folder, rank, ranks)) for rank in range(ranks)]
        options = state.inner("options")
        optimizer = options.text("optimizer") if "optimizer" in options else "adamw"  # the only one of older runs
        places = _places(source, optimizer, options.text("decay"), kind)
        length = {name: header.shape[0] for name, header in shards[0].headers().items() if len(header.shape) == 1}
        sizes = state.inner("sizes")
        for name in {place.name for place in places.values()}:
            whole = sum(math.prod(place.shape) for place in places.values() if place.name == name)
            if sizes.whole(name) != whole or length.get(name, 0) * ranks < whole:
                raise ConversionError(
                    f"{source.folder}: {name} has {sizes.values[name]} elements, this model needs {whole:,}: the fp32 "
                    "weights belong to another model. --dtype keep takes the weights that the model uses"
                )
        return Masters(places, shards, length)

    def headers(self) -> dict[str, Header]:
        return {name: Header(place.shape, torch.float32) for name, place in self._places.items()}

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        place = self._places[name]
        row = math.prod(place.shape[1:])
        if dim == 0:
            return self._flat(place.name, place.start + start * row, length * row).view(length, *place.shape[1:])
        return self._flat(place.name, place.start, math.prod(place.shape)).view(place.shape).narrow(dim, start, length)

    def _flat(self, name: str, start: int, count: int) -> Tensor:
        """Read elements of a flat tensor, from as many ranks' files as needed."""
        length, pieces = self._length[name], []
        while count:
            rank, at = divmod(start, length)
            taken = min(count, length - at)
            pieces.append(self._shards[rank].read(name, 0, at, taken))
            start, count = start + taken, count - taken
        return torch.cat(pieces)


def use_masters(source: Source) -> bool:
    """Make `source` return fp32 masters instead of its 16-bit weights. False, with no change, if there are none."""
    masters = Masters.of(source)
    if masters is None:
        return False
    checked = _Checked(masters, dict(source.files), source.folder)
    source.files |= dict.fromkeys(masters.headers(), checked)
    source.headers |= masters.headers()
    return True


def use_average(source: Source) -> None:
    """Make `source` return the moving average of its weights, in fp32. Raises ConversionError if it has none."""
    state = inside.read_fields(source.folder, "state.json")
    averages = Masters.of(source, "ema") if state is not None and "ema.0" in state.inner("sizes") else None
    if averages is None:
        raise ConversionError(
            f"{source.folder} has no average of the weights: name a run that was trained with --ema-decay, or leave "
            "--ema out"
        )
    source.files |= dict.fromkeys(averages.headers(), averages)
    source.headers |= averages.headers()


class _Checked:
    """Compares each master with the weights that were rounded from it, so that it cannot be another parameter's."""

    def __init__(self, masters: Masters, rounded: Mapping[str, TensorFile], folder: Path) -> None:
        self._masters, self._rounded, self._folder = masters, rounded, folder

    def headers(self) -> dict[str, Header]:
        return self._masters.headers()

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        master = self._masters.read(name, dim, start, length)
        rounded = self._rounded[name].read(name, dim, start, length)
        # Half a unit in the last place; below fp16's smallest normal number, half of its smallest step.
        if not torch.isclose(rounded.float(), master, rtol=torch.finfo(rounded.dtype).eps, atol=2.0**-25).all():
            raise ConversionError(
                f"{self._folder}: the fp32 weights of {name} are not those that its {rounded.dtype} weights were "
                "rounded from: the checkpoint is damaged. --dtype keep takes the weights that the model uses"
            )
        return master


def _shard(folder: Path, rank: int, ranks: int) -> Path:
    path = inside.find(folder, f"rank-{rank}-of-{ranks}.safetensors")
    if path is None:
        raise ConversionError(
            f"{folder} has no rank-{rank}-of-{ranks}.safetensors, which holds a part of the fp32 weights: copy it "
            "there, or take the weights that the model uses with --dtype keep"
        )
    return path


def _places(source: Source, optimizer: str, decay: str, kind: str) -> dict[str, _Place]:
    with torch.device("meta"):
        model = Phi(source.config) if source.layout == "merged" else ReferencePhi(source.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    groups: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    for name, shape in shapes.items():
        groups[parameter_group(name, len(shape), optimizer=optimizer, decay=decay)][name] = shape
    places = {}
    for number, group in enumerate(filter(None, groups)):
        start = 0
        for name, shape in group.items():
            places[name] = _Place(f"{kind}.{number}", start, shape)
            start += math.prod(shape)
    return places

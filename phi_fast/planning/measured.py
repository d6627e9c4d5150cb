"""Efficiencies of a GPU as `make gpu` measured them, in place of the assumed ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from ..json_files import Fields, read_object
from .devices import Device, Figure, Kind

KINDS: tuple[Kind, ...] = ("product", "attention forward", "attention backward", "memory")


def measured_device(device: Device, path: Path) -> Device:
    """`device` with the efficiencies of a results file of `make gpu`; a kind that it has not measured stays assumed.

    Raises UsageError for a file that cannot be read, is none of `make gpu`'s, is of another GPU, or measured nothing.
    """
    way_out = "Give a file that make gpu wrote into benchmarks/results/"
    try:
        document = read_object(path, way_out=way_out)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. {way_out}") from error
    name = document.inner("machine").text("device")
    if device.name.replace("-", " ").split()[0] not in name:
        raise UsageError(f"{path} was measured on {name}, and --gpu is {device.name}: give the file of that GPU")
    results = document.inner("stages").inner("step").inner("results")
    if "efficiencies" not in results:
        raise UsageError(f"{path} has no efficiencies: its run did not reach the profile of a step. {way_out}")
    found = results.inner("efficiencies")
    source = f"measured on {name}: {path.name}"
    return replace(
        device, efficiency=device.efficiency | {kind: _share(found, kind, source) for kind in KINDS if kind in found}
    )


def _share(found: Fields, kind: Kind, source: str) -> Figure:
    share = found.number(kind)
    if not 0 < share <= 1.5:
        found.refuse(kind, "a share of the data sheet's rate, above 0")
    return Figure(share, "", source)

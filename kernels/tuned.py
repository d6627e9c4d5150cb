"""The table of what `phi_fast.kernels.tune` measured on a GPU: where it lies, and whether it may be used.

One JSON file per GPU model, PHI_FAST_TUNED or phi_fast/tuned/GPU.json in the user's cache folder (XDG_CACHE_HOME, else
~/.cache). It is read at the first launch on a device, and used only if the GPU and the version of Triton are those that
it was measured with. A table that cannot be used is a warning that names the file; the kernels then have the tiles that
were chosen by hand. PHI_FAST_TUNED set to nothing means no table.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch

VERSION = 1
"""Version of the file's format."""
VARIABLE = "PHI_FAST_TUNED"
BY_HAND = "chosen by hand"
"""Words for tiles that come from no table."""
_LARGEST = 16 << 20  # bytes: a hundred shapes take 1 MB


class TableError(ValueError):
    """A table that cannot be used; the message names the file, what is wrong, and the way out."""


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured on one GPU."""

    path: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)
    """The file's content; empty where no table is used."""
    note: str = ""
    """What is used, in words."""

    def tiles(self, kernel: str, case: Any, parse: Callable[[Any], Any]) -> dict[Any, Any]:
        """Case -> tile of one kernel. case: the NamedTuple of its cases; parse: makes a tile of a JSON object.

        Entries that this version's kernels do not have are left out, with a warning.
        """
        return self._cases("tiles", "kernel", kernel, case, lambda entry: parse(entry.get("tile")))

    def backends(self, op: str, case: Any) -> dict[Any, str]:
        """Case -> back end that was the fastest for `op`; entries are left out as `tiles` does."""
        return self._cases("backends", "op", op, case, lambda entry: str(entry.get("backend")))

    def _cases(self, part: str, key: str, name: str, case: Any, value: Callable[[Any], Any]) -> dict[Any, Any]:
        found = {}
        for entry in self.document.get(part, ()):
            if entry.get(key) == name:
                try:
                    found[make_case(case, entry.get("case"))] = value(entry)
                except ValueError as error:
                    warn(f"{self.path}: {error}; this entry is not used: measure again with {command()}")
        return found


def make_case(case: Any, given: Any) -> Any:
    """A NamedTuple `case` of a JSON object. Raises ValueError for other fields or types than its own."""
    expected = get_type_hints(case)
    if not isinstance(given, dict) or {name: type(value) for name, value in given.items()} != expected:
        raise ValueError(f"the case {given!r} is not one of {', '.join(expected)}")
    return case(**given)


def command() -> str:
    """The command that measures."""
    return "python -m phi_fast.kernels.tune"


def place(gpu: str) -> Path | None:
    """Where the table of a GPU of this name lies; None where the environment says that there is none."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user without a home
        return (Path(cache) if cache else Path.home() / ".cache") / "phi_fast" / "tuned" / f"{_slug(gpu)}.json"
    return None


def _slug(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")


def versions() -> dict[str, str]:
    """Versions that a measurement depends on, beside the GPU."""
    return {"triton": importlib.import_module("triton").__version__}


@lru_cache(maxsize=64)
def of(device: torch.device) -> Table:
    """The table of `device`'s measurements, empty where none can be used; that a file cannot be used is a warning."""
    gpu = torch.cuda.get_device_name(device)
    path = place(gpu)
    if path is None:
        return Table(note=BY_HAND)
    try:
        return usable(path, gpu)
    except FileNotFoundError:
        note = f"{BY_HAND}: there is no {path}; {command()} measures"
        if VARIABLE in os.environ:
            warn(f"{VARIABLE}: there is no file {path}; tiles are as {BY_HAND}")
        return Table(path, note=note)
    except (TableError, OSError) as error:
        warn(f"{error}; tiles are as {BY_HAND}")
        return Table(path, note=f"{BY_HAND}: {error}")


def forget() -> None:
    """Read the tables anew at the next launch."""
    of.cache_clear()


def usable(path: Path, gpu: str) -> Table:
    """The table in `path`, for the GPU `gpu` and this Triton. Raises TableError, FileNotFoundError or OSError."""
    document = read(path)
    here = {"gpu": gpu, **versions()}
    for what, value in here.items():
        if document[what] != value:
            raise TableError(
                f"{path} was measured with {what} {document[what]}, and this is {value}: measure with {command()}"
            )
    count = len(document["tiles"])
    return Table(path, document, f"{count} tiles measured on {gpu}, from {path}")


def read(path: Path) -> dict[str, Any]:
    """A table's content, checked as far as every GPU can. Raises TableError, FileNotFoundError or OSError."""
    if path.exists() and not path.is_file():
        raise TableError(f"{path} is not a regular file: name a table that {command()} wrote, or set {VARIABLE}=")
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise TableError(f"{path} has more than {_LARGEST >> 20} MiB, which no table has: remove it")
    try:
        document = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} is damaged ({error}): remove it, or measure again with {command()}") from error
    known = isinstance(document, dict) and document.get("version") == VERSION
    texts = ("gpu", "architecture", "triton")
    lists = ("tiles", "backends")
    if not known or not all(isinstance(document.get(name), str) for name in texts):
        raise TableError(f"{path} is not a table of version {VERSION}: remove it, or measure again with {command()}")
    if not all(isinstance(document.get(name), list) and _objects(document[name]) for name in lists):
        raise TableError(f"{path} is damaged (tiles and backends must be lists of objects): remove it")
    return document


def _objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a table so that the file holds it whole or is as it was. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def warn(message: str) -> None:
    """Say what is wrong with a table, without ending what runs."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)

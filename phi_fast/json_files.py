"""Reading of JSON from outside: every assumption is checked, and the error names what is wrong.

Only regular files of a bounded size are read, so that a FIFO or a device cannot block a run or fill its memory. The
text must be UTF-8, the JSON strict (no NaN) and nested to a bounded depth, and `Fields` checks each value's type and
range.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .errors import UsageError

MAX_BYTES = 64 * 2**20
"""Default limit of a file's size: far above any manifest, configuration or tokenizer."""
MAX_LINE_BYTES = 16 * 2**20
"""The longest line of a JSON-lines file."""
MAX_DEPTH = 100
"""The deepest nesting of objects and arrays."""


class JsonFileError(UsageError):
    """A file does not hold the expected JSON; the message names the file, the field and what was expected."""


def read_regular(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most `max_bytes`, without ever blocking.

    Raises FileNotFoundError and other OSErrors as `open` does, and JsonFileError for a FIFO, a device, a folder, or a
    larger file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise JsonFileError(f"{path} is {_kind(status.st_mode)}, expected a regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise JsonFileError(f"{path} has more than {max_bytes:,} bytes, too many for such a file")
    return data


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file's value. Raises OSError as `open` does, and JsonFileError for anything but strict JSON."""
    return parse_json(read_regular(path, max_bytes), str(path))


def read_object(path: Path, *, way_out: str = "", max_bytes: int = MAX_BYTES) -> Fields:
    """Read a JSON file's object, for typed reads. Raises as `read_json` does, and JsonFileError if it is no object."""
    return Fields.of(read_json(path, max_bytes=max_bytes), str(path), way_out)


def read_lines(path: Path, *, whole: bool = False, max_bytes: int = MAX_BYTES * 64) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE:LINE", value) for each line of a JSON-lines file. Raises as `read_json` and `parse_lines` do."""
    yield from parse_lines(read_regular(path, max_bytes), str(path), whole=whole)


def parse_lines(data: bytes, where: str, *, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield ("WHERE:LINE", value) for each line of JSON lines; blank lines are skipped.

    A last line without a line feed may have been cut short, for example by a kill: it is skipped if it is not JSON,
    unless `whole` is true, which says that the lines are known to be complete.
    Raises JsonFileError naming the line.
    """
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        here = f"{where}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise JsonFileError(f"{here} has {len(line):,} bytes, expected at most {MAX_LINE_BYTES:,}")
        try:
            value = parse_json(line, here)
        except JsonFileError:
            if number == len(lines) and not whole:
                return
            raise
        yield here, value


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON text. where: its name in errors. Raises JsonFileError."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
        _check_depth(value)
    except RecursionError:
        raise JsonFileError(f"{where} nests deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, too many digits, NaN
        raise JsonFileError(f"{where} is not JSON: {error}") from None
    return value


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"model": {"hidden_size": 64}} becomes {"model.hidden_size": 64}."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True)
class Fields:
    """Typed reads from one JSON object; errors name the file and the field's path, and end with `way_out`."""

    values: dict[str, Any]
    where: str
    """File, or file and line, that the object comes from."""
    way_out: str = ""
    """What the user should do, appended to each message."""
    prefix: str = ""
    """Path of this object inside the file, ending in a dot."""
    error: type[JsonFileError] = field(default=JsonFileError)
    """Class of the errors raised."""

    @staticmethod
    def of(value: Any, where: str, way_out: str = "", error: type[JsonFileError] = JsonFileError) -> Fields:
        """Wrap a JSON value. Raises `error` if it is not an object."""
        if not isinstance(value, dict):
            raise error(_sentence(f"{where} holds a JSON {type(value).__name__}, expected an object", way_out))
        return Fields(value, where, way_out, error=error)

    def __contains__(self, name: str) -> bool:
        """Return whether the field exists and is not null."""
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        value = self.values.get(name)
        return value if isinstance(value, str) else self.refuse(name, "a string")

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return tuple(value) if good and value is not None else self.refuse(name, "a list of strings")

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        return value if isinstance(value, bool) else self.refuse(name, "true or false")

    def whole(self, name: str, least: int = 0, most: int = 2**63 - 1) -> int:
        """Read an integer in [least, most]."""
        value = self.values.get(name)
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        reach = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
        return value if good and value is not None else self.refuse(name, f"an integer {reach}")

    def number(self, name: str) -> float:
        """Read a finite number."""
        value = self.values.get(name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        return float(value) if good and value is not None else self.refuse(name, "a finite number")

    def items(self, name: str) -> list[Any]:
        value = self.values.get(name)
        return value if isinstance(value, list) else self.refuse(name, "a list")

    def inner(self, name: str) -> Fields:
        """Read an object."""
        value = self.values.get(name)
        inner = value if isinstance(value, dict) else self.refuse(name, "an object")
        return Fields(inner, self.where, self.way_out, f"{self.prefix}{name}.", self.error)

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise the error for a bad field; also for checks that this class does not have."""
        found = repr(self.values[name])[:80] if name in self.values else "missing"
        message = f"{self.where}: {self.prefix}{name} is {found}, expected {expected}"
        raise self.error(_sentence(message, self.way_out))


def _sentence(message: str, way_out: str) -> str:
    return f"{message}. {way_out}" if way_out else message


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((name for test, name in kinds.items() if test(mode)), "a socket")

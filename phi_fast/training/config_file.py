"""Configuration files of `phi_fast.train`: TOML, or the config.json of a run, with each option by its name."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from ..errors import UsageError
from ..json_files import read_object, read_regular

if TYPE_CHECKING:
    from .options import Options

OF_ONE_START = ("run_dir", "resume", "elastic", "allow_change", "stop_after", "profile", "config", "print_config")
"""Options that apply to a single start, and that neither --resume nor a run's config.json passes on."""
ONLY_TYPED = ("config", "print_config")
"""Options that no file can hold."""
NONE = "None"
"""What stands for no value in TOML, which has no null; on the command line it is the same word."""


class ConfigFileError(UsageError):
    """A configuration file has a key that is no option, or a value of the wrong kind."""


def read_config(path: Path, kind: type[Options]) -> dict[str, Any]:
    """Read the options that a file sets, each converted to its field's type; "model" maps to the fields that it sets.

    path: a TOML file, a run's config.json, or the run directory. kind: the dataclass of the options. Of config.json,
    the options in `OF_ONE_START` are left out.
    Raises UsageError for a file that cannot be read, ConfigFileError for a key or a value that does not fit.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.suffix == ".json":
            found = read_object(path).values
            return typed(kind, {name: value for name, value in found.items() if name not in OF_ONE_START}, str(path))
        content = read_regular(path)
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror}): name a TOML file or a run") from None
    try:
        found = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigFileError(f"{path} is not TOML: {error}") from None
    return typed(kind, found, str(path))


def typed(kind: type[Any], found: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Convert values read from TOML or JSON to the types of the fields of the dataclass `kind`.

    Keys are the fields' names, or the same with "-" for "_" as on the command line. A field that is a dataclass itself
    gives a dict of its fields. Raises ConfigFileError naming file, key, value and what was expected.
    """
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind) if field.name not in ONLY_TYPED]
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            way_out = f"did you mean {prefix}{near[0]}?" if near else f"it has {', '.join(names)}"
            raise ConfigFileError(f"{where}: {prefix}{key} is not an option of phi_fast.train; {way_out}")
        if name in values:
            raise ConfigFileError(f"{where}: {prefix}{name} is set twice; leave one out")
        values[name] = _typed(hints[name], value, where, f"{prefix}{name}")
    return values


def _typed(hint: Any, value: Any, where: str, name: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigFileError(f"{where}: {name} is {value!r}, expected a table of its fields")
        return typed(hint, value, where, f"{name}.")  # type: ignore[arg-type]
    if value == NONE and NoneType in get_args(hint):
        return None
    text = json.dumps(value, default=lambda other: {type(other).__name__: str(other)})  # TOML has dates, too
    try:
        return TypeAdapter(hint).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        if first["type"] == "missing":
            raise ConfigFileError(f"{where}: {name} is {value!r}, expected an entry more, {place}") from None
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise ConfigFileError(f"{where}: {place} is {first['input']!r}, expected {expected}") from None


def overlay(options: Options, values: Mapping[str, Any], where: str) -> Options:
    """Return `options` with the values of a file in their place. Raises ConfigFileError for an impossible model."""
    try:
        model = options.model.replace(**values.get("model", {}))
    except ValueError as error:
        raise ConfigFileError(f"{where}: model.{error}") from None
    return replace(options, **{**values, "model": model})


def as_toml(options: Options) -> str:
    """Write every option but `ONLY_TYPED` as TOML that `read_config` reads back."""
    values = {name: value for name, value in asdict(options).items() if name not in ONLY_TYPED}
    return tomli_w.dumps(plain(values, none=NONE))


def plain(value: Any, none: str | None = None) -> Any:
    """Make a value fit for JSON, or with a word for None for TOML: paths become text, and tuples lists."""
    if isinstance(value, dict):
        return {key: plain(item, none) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, none) for item in value]
    return none if value is None else str(value) if isinstance(value, Path) else value

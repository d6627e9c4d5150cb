"""Benchmark files for decontamination: JSON lines or Parquet of any layout, each text of a record taken by itself."""

from __future__ import annotations

import ast
import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.preparation.containers import compression, open_stream, read
from ..files import sha256_of
from ..json_files import MAX_BYTES, parse_lines
from .documents import CurateError

_MOST_FIELDS = 12
"""Texts of a record among which a program's two halves are looked for (HumanEval: prompt and canonical_solution)."""


@dataclass(frozen=True)
class Item:
    """One record of a benchmark."""

    name: str
    """"FILE:LINE", the file without its folder."""
    texts: tuple[str, ...]
    """Every text of the record, those in lists and inner objects, too."""
    programs: tuple[str, ...]
    """Python source among them; the tests that a record has are left out."""


def read_items(files: Sequence[Path], fields: Sequence[str] = ()) -> list[Item]:
    """Read benchmark files. fields: the fields whose texts count; none names all.

    Raises CurateError for a file that cannot be read, holds no text, or lacks every one of the fields.
    """
    items: list[Item] = []
    for file in files:
        try:
            found = [_item(f"{file.name}:{number}", record, fields) for number, record in _records(file)]
        except OSError as error:
            raise CurateError(f"{file} cannot be read: {error.strerror or error}") from error
        found = [item for item in found if item.texts]
        if not found:
            among = f" in the fields {', '.join(fields)}" if fields else ""
            raise CurateError(f"{file} holds no texts{among}: name a benchmark's JSON lines or Parquet")
        items += found
    return items


def digest(files: Sequence[Path]) -> str:
    """Hash the files' contents, for work that is resumed."""
    return sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix.lower() in (".parquet", ".pq"):
        import pyarrow.parquet

        try:
            with file.open("rb") as raw:
                rows = pyarrow.parquet.ParquetFile(raw).read().to_pylist()
        except (pyarrow.ArrowException, ValueError) as error:
            raise CurateError(f"{file} is not Parquet: {error}") from error
        yield from ((str(number), row) for number, row in enumerate(rows))
        return
    with file.open("rb") as raw:
        data = read(open_stream(raw, file, compression(file)), MAX_BYTES * 64, file)
    for place, value in parse_lines(data, str(file), whole=True):
        if not isinstance(value, dict):
            raise CurateError(f"{place} holds a JSON {type(value).__name__}, expected an object: one record per line")
        yield place.rpartition(":")[2], value


def _item(name: str, record: dict[str, Any], fields: Sequence[str]) -> Item:
    chosen = {field: value for field, value in record.items() if not fields or field in fields}
    texts = tuple(dict.fromkeys(_texts(list(chosen.values()))))
    own = [value for field, value in chosen.items() if isinstance(value, str) and not field.lower().startswith("test")]
    return Item(name, texts, tuple(_programs(own)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _programs(texts: list[str]) -> Iterator[str]:
    """Find Python functions in a record: a text, or two that make one only together; the longer one counts then."""
    halves = texts[:_MOST_FIELDS]
    for first in halves:
        if "def " not in first:
            continue
        joined = [first + other for other in halves if other is not first and other.startswith((" ", "\t", "\n"))]
        for candidate in [*joined, first]:
            if has_function(candidate):
                yield candidate
                break


def has_function(source: str) -> bool:
    """Tell whether a text is Python source that defines a function."""
    tree = parse(source)
    return tree is not None and any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def parse(source: str) -> ast.Module | None:
    """Parse Python source, also if it is indented as a whole; None for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences
            return ast.parse(textwrap.dedent(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def describe(files: Sequence[Path], items: Sequence[Item]) -> str:
    """Summarize in one line what was read."""
    programs = sum(len(item.programs) for item in items)
    return f"{len(items):,} records of {len(files):,} benchmark files, with {programs:,} Python programs"


def as_json(value: Any) -> str:
    """Write a value for a message or a list."""
    return json.dumps(value, ensure_ascii=False)

"""Reads the documents of tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..remote_files import RemoteError
from ..vocabulary import END_OF_TEXT
from .containers import PrepareError, damaged
from .conversations import Conversations
from .inputs import Input
from .remote import RemotePath
from .task import Task
from .tasks import open_dataset, parquet_metadata

_SEPARATOR = re.compile(rb"\n?" + re.escape(END_OF_TEXT.encode()) + rb"\n?")
_ROWS = 1024
"""Number of a table's rows in memory at once."""


@dataclass
class Reader:
    """Reads the documents of tasks."""

    text_field: str
    """JSONL, Parquet, datasets: the field that holds the text."""
    skip_malformed: bool = False
    """Leave out records that are not UTF-8, not JSON, or without a text; otherwise they are errors."""
    conversations: Conversations | None = None
    """Reads lines as conversations instead; None for texts."""
    skipped: int = field(default=0, init=False)
    """Number of records left out so far."""

    def documents(self, task: Task) -> Iterator[str]:
        """The task's documents, without empty ones. Raises PrepareError naming a malformed record."""
        records, parse = _READERS[task.kind]
        for place, record in records(task, self.text_field):
            try:
                text = self.conversations.document(record) if self.conversations else parse(record, self.text_field)
                text.encode()  # JSON can escape half a surrogate pair
            except (ValueError, TypeError, RecursionError) as error:  # RecursionError: deeply nested JSON
                if not self.skip_malformed:
                    raise PrepareError(
                        f"{place}: {error}. Correct the file, or leave out what is malformed with --skip-malformed"
                    ) from error
                self.skipped += 1
            else:
                if text:
                    yield text


def check_field(inputs: Iterable[Input], text_field: str) -> None:
    """Check, before any work, that tables have the text field. Raises PrepareError."""
    for entry in inputs:
        if entry.kind == "parquet":
            import pyarrow.parquet

            try:
                names = parquet_metadata(entry.path).schema.to_arrow_schema().names
            except (OSError, pyarrow.ArrowException) as error:
                raise PrepareError(f"{entry.path} is not Parquet: {error}") from error
        elif entry.kind == "dataset":
            names = open_dataset(entry.path).column_names
        else:
            continue
        if text_field not in names:
            raise PrepareError(
                f"{entry.path} has no column {text_field!r}, but {', '.join(names)}: name one with --text-field"
            )


def _texts(task: Task, text_field: str) -> Iterator[tuple[str, bytes]]:
    for path in task.paths:
        data = path.read_bytes() if task.data is None else task.data
        for part in _SEPARATOR.split(data):
            yield str(path), part


def _lines(task: Task, text_field: str) -> Iterator[tuple[str, bytes]]:
    assert task.data is not None
    for number, line in enumerate(task.data.split(b"\n"), task.first):
        if line and not line.isspace():
            yield f"{task.paths[0]}, line {number}", line


def _table(read: Callable[[Task, str], Iterator[tuple[str, object]]]) -> Callable[[Task, str], Iterator[Any]]:
    """Make a reader of tables report any exception of a damaged table as a PrepareError naming the file."""

    def named(task: Task, text_field: str) -> Iterator[tuple[str, object]]:
        try:
            yield from read(task, text_field)
        except RemoteError:
            raise
        except Exception as error:  # whatever pyarrow and datasets raise
            raise damaged(task.paths[0], error) from error

    return named


@_table
def _row_group(task: Task, text_field: str) -> Iterator[tuple[str, object]]:
    import pyarrow.parquet

    row = 0
    path = task.paths[0]
    with path.open("rb") as raw:
        known = parquet_metadata(path) if isinstance(path, RemotePath) else None  # saves requests per row group
        file = pyarrow.parquet.ParquetFile(raw, metadata=known)
        for batch in file.iter_batches(_ROWS, row_groups=[task.first], columns=[text_field]):
            for value in _undecoded(batch.column(0)):
                yield f"{task.paths[0]}, row group {task.first}, row {row}", value
                row += 1


@_table
def _rows(task: Task, text_field: str) -> Iterator[tuple[str, object]]:
    dataset = open_dataset(task.paths[0]).select_columns([text_field]).with_format("arrow")
    for first in range(task.first, task.last, _ROWS):
        column = dataset[first : min(first + _ROWS, task.last)].column(text_field)
        for row, value in enumerate(_undecoded(column), first):
            yield f"{task.paths[0]}, row {row}", value


def _undecoded(column: Any) -> list[object]:
    """A column's values, strings as bytes: one that is not UTF-8 is an error in that record, not in the table."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    values: list[object] = column.to_pylist()
    return values


def _decode(data: bytes, text_field: str) -> str:
    return data.removeprefix(b"\xef\xbb\xbf").decode()


def _parse_line(line: bytes, text_field: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with a field {text_field!r}, found {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r} among {', '.join(record)}; name the one with --text-field")
    return _check_text(record[text_field], text_field)


def _check_value(value: object, text_field: str) -> str:
    return value.decode() if isinstance(value, bytes) else _check_text(value, text_field)


def _check_text(value: object, text_field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{text_field!r} is {type(value).__name__}, expected text")
    return value


_READERS: dict[str, tuple[Callable[[Task, str], Iterator[tuple[str, Any]]], Callable[[Any, str], str]]] = {
    "text": (_texts, _decode),
    "lines": (_lines, _parse_line),
    "parquet": (_row_group, _check_value),
    "dataset": (_rows, _check_value),
}

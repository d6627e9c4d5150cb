"""Cuts JSON lines and Parquet files into shards: the unit that a worker reads, filters and writes, and that resumes
skip.

Shards depend only on the inputs and on `shard_bytes`, never on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.preparation.containers import PrepareError, damaged, open_stream, read
from ..data.preparation.inputs import Input, find_inputs
from ..data.preparation.tasks import parquet_metadata
from .documents import CurateError, Document, MalformedError, from_record, parse_line

SHARD_BYTES = 2**24
"""Bytes of JSON lines per shard: small enough to lose when interrupted, large enough to sync to disk."""
MAX_DOCUMENT_BYTES = 2**24
"""Default length of the longest line that is read as a document."""
_READ = 2**20
_ROWS = 256
"""Rows of a table in memory at once."""


@dataclass(frozen=True)
class Reading:
    """How records become documents."""

    text_field: str = "text"
    """Field or column that holds the text."""
    skip_malformed: bool = False
    """Count and list records that are no documents, instead of stopping at the first."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A record with a longer line or text is malformed."""


@dataclass(frozen=True)
class Shard:
    """A part of one input."""

    number: int
    path: Path
    size: int
    """Bytes on disk that it covers, for the progress bar."""
    data: bytes | None
    """JSON lines; None for a table."""
    first: int
    """The number of the first line, from 1, or the row group's, from 0."""
    refused: tuple[tuple[str, str], ...] = ()
    """(place, why) of what could not even be cut into lines: too long, or behind damage."""


@dataclass
class Malformed:
    """Collects the records that are no documents; stops at the first one unless they are to be skipped."""

    skip: bool
    found: list[tuple[str, str]] = field(default_factory=list)
    """(place, why), in order."""

    def add(self, place: str, why: str) -> None:
        """Note a record. Raises CurateError if malformed records are not to be skipped."""
        if not self.skip:
            raise CurateError(f"{place}: {why}. Correct the file, or leave out what is malformed with --skip-malformed")
        self.found.append((place, why))


def find(paths: list[Path]) -> list[Input]:
    """Find the inputs. Raises CurateError or PrepareError for paths that hold no JSON lines and no Parquet."""
    if not paths:
        raise CurateError("name files or folders of JSON lines or Parquet to read")
    entries = find_inputs(paths, suffixes=()).read
    for entry in entries:
        if entry.kind not in ("lines", "parquet"):
            what = "a saved dataset" if entry.kind == "dataset" else "plain text"
            raise CurateError(
                f"{entry.path} is {what}; curate reads JSON lines "
                '(.jsonl, also compressed) and Parquet: write each text as a line {"text": …, "id": …}'
            )
    return entries


def cut(inputs: list[Input], reading: Reading, shard_bytes: int = SHARD_BYTES) -> Iterator[Shard]:
    """Cut the inputs into shards, in order.

    Raises CurateError for a damaged file or a line that is too long, unless malformed records are skipped: then the
    shard's `refused` names it, and no more than `max_document_bytes` of it are ever in memory.
    """
    number = 0
    for entry in inputs:
        for shard in (_lines if entry.kind == "lines" else _row_groups)(entry, reading, shard_bytes, number):
            yield shard
            number += 1


def documents(shard: Shard, reading: Reading, malformed: Malformed) -> Iterator[Document]:
    """Read a shard's documents, without empty texts' records being special. Raises CurateError as `Malformed` does."""
    for place, why in shard.refused:
        malformed.add(place, why)
    records = _table(shard, malformed) if shard.data is None else _parsed(shard, reading)
    for place, make in records:
        try:
            document = make(reading.text_field, place)
            size = len(document.text.encode())
            if size > reading.max_document_bytes:
                raise MalformedError(_too_long(size, reading.max_document_bytes))
        except UnicodeEncodeError:
            malformed.add(place, "half of a surrogate pair, which is not Unicode text")
        except MalformedError as error:
            malformed.add(place, str(error))
        else:
            yield document


def _too_long(size: int, limit: int) -> str:
    return f"a document of {size:,} bytes, more than --max-document-bytes {limit:,}"


def _parsed(shard: Shard, reading: Reading) -> Iterator[tuple[str, Any]]:
    assert shard.data is not None
    for number, line in enumerate(shard.data.split(b"\n"), shard.first):
        if line and not line.isspace():
            yield f"{shard.path}:{number}", lambda field, place, line=line: parse_line(line, field, place)


def _lines(entry: Input, reading: Reading, shard_bytes: int, number: int) -> Iterator[Shard]:
    with entry.path.open("rb") as raw:
        stream = open_stream(raw, entry.path, entry.compression)
        pending, line, place = bytearray(), 1, 0
        refused: list[tuple[str, str]] = []
        skipping = 0  # bytes so far of a line that is too long
        limit = reading.max_document_bytes + 2**16  # room for the other fields

        def note(at: int, why: str) -> None:
            here = f"{entry.path}:{at}"
            Malformed(reading.skip_malformed).add(here, why)
            refused.append((here, why))

        while True:
            try:
                data = read(stream, min(_READ, shard_bytes), entry.path)
            except PrepareError as error:
                note(line + pending.count(b"\n"), f"the rest of the file cannot be read: {error}")
                data = b""
                pending = pending[: pending.rfind(b"\n") + 1]  # the last line was cut short
                skipping = 0
            at_end = not data
            if skipping:
                cut_at = data.find(b"\n")
                skipping += len(data) if cut_at < 0 else cut_at
                if cut_at < 0 and not at_end:
                    continue
                note(line + pending.count(b"\n"), _too_long(skipping, reading.max_document_bytes))
                skipping, data = 0, data[max(cut_at, 0) :]
            pending += data
            end = pending.rfind(b"\n") + 1
            if len(pending) - end > limit:
                skipping = len(pending) - end
                del pending[end:]
            if at_end or end >= shard_bytes:
                end = len(pending) if at_end else end
                if end or refused:
                    yield Shard(number, entry.local, raw.tell() - place, bytes(pending[:end]), line, tuple(refused))
                    number += 1
                line += pending.count(b"\n", 0, end)
                place, refused = raw.tell(), []
                del pending[:end]
            if at_end:
                return


def _row_groups(entry: Input, reading: Reading, shard_bytes: int, number: int) -> Iterator[Shard]:
    try:
        groups = parquet_metadata(entry.path).num_row_groups
    except Exception as error:  # whatever pyarrow raises for a damaged file
        where, why = str(entry.path), str(damaged(entry.path, error))
        Malformed(reading.skip_malformed).add(where, why)
        yield Shard(number, entry.local, entry.size, b"", 0, ((where, why),))
        return
    for group in range(groups):
        size = entry.size * (group + 1) // groups - entry.size * group // groups
        yield Shard(number + group, entry.local, size, None, group)


def _table(shard: Shard, malformed: Malformed) -> Iterator[tuple[str, Any]]:
    """Read a row group; a row that cannot be converted is malformed, and damage ends the row group."""
    import pyarrow.parquet

    row = 0
    try:
        with shard.path.open("rb") as raw:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(_ROWS, row_groups=[shard.first]):
                for record in _records(batch):
                    place = f"{shard.path}:{shard.first}.{row}"
                    yield place, lambda field, place, record=record: _from_row(record, field, place)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        malformed.add(f"{shard.path}:{shard.first}.{row}", f"the rest of the row group cannot be read: {error}")


def _from_row(record: dict[str, Any] | Exception, text_field: str, place: str) -> Document:
    if isinstance(record, Exception):
        raise MalformedError(f"a row that cannot be read: {str(record)[:200]}")
    return from_record(record, text_field, place)


def _records(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    try:
        yield from batch.to_pylist()
    except Exception:  # text that is not UTF-8, a time out of range, …
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except Exception as error:
                yield error

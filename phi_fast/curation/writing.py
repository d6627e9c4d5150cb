"""Filters one shard: reads its documents, lets a step decide, and writes what is kept, dropped and malformed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import replacing, write_atomically
from ..json_files import read_object
from .documents import Document, Drop, MalformedError, to_line
from .shards import Malformed, Reading, Shard, documents
from .steps import batches

LEVEL = 3
"""Zstandard's compression level, its default."""
Decide = Callable[[Sequence[Document]], list[Drop | None]]


@dataclass
class Counts:
    """What happened to the documents of one shard, or of all. Sizes are bytes of text in UTF-8."""

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    changed: int = 0
    """Documents kept with another text."""
    malformed: int = 0
    """Records that are no documents: not in `documents_in`."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> documents."""
    malformed_examples: list[list[str]] = field(default_factory=list)
    """[place, why] of the first few; malformed.log has all."""

    def add(self, other: Counts) -> None:
        """Add another shard's counts, which come later."""
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out", "changed", "malformed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped = dict(sorted((Counter(self.dropped) + Counter(other.dropped)).items()))
        self.malformed_examples = (self.malformed_examples + other.malformed_examples)[:_EXAMPLES]


_EXAMPLES = 10


def counts_file(folder: Path, number: int) -> Path:
    return folder / f"counts-{number:05d}.json"


def read_counts(folder: Path, number: int) -> Counts | None:
    """Read the counts of a finished shard; None for one that is not finished."""
    try:
        return Counts(**read_object(counts_file(folder, number)).values)
    except FileNotFoundError:
        return None


def part(number: int) -> str:
    """Name the file of a shard's kept documents."""
    return f"part-{number:05d}.jsonl.zst"


def filter_shard(shard: Shard, reading: Reading, decide: Decide, batch: int, folder: Path, *, texts: bool) -> Counts:
    """Write what a step keeps of a shard to `folder`/output, and its lists and counts to `folder`/work, the counts
    last.

    texts: whether the list of dropped documents holds their texts. Raises CurateError for malformed records that are
    not to be skipped, and OSError."""
    import zstandard

    counts, malformed = Counts(), Malformed(reading.skip_malformed)
    work = folder / "work"
    dropped = work / f"dropped-{shard.number:05d}.log"
    with (
        replacing(folder / "output" / part(shard.number)) as raw,
        zstandard.ZstdCompressor(level=LEVEL).stream_writer(raw, closefd=False) as kept,
        replacing(dropped) as left_out,
    ):
        for group in batches(documents(shard, reading, malformed), batch):
            before = [document.text for document in group]
            for text, document, drop in zip(before, group, decide(group), strict=True):
                size = len(text.encode())
                if drop is None:
                    try:
                        line = to_line(document)
                    except MalformedError as error:
                        malformed.add(document.id, str(error))
                        continue
                    kept.write(line)
                    counts.documents_out += 1
                    counts.bytes_out += size if document.text is text else len(document.text.encode())
                    counts.changed += document.text != text
                else:
                    counts.dropped[drop.reason] = counts.dropped.get(drop.reason, 0) + 1
                    left_out.write(_dropped(document, drop, text if texts else None))
                counts.documents_in += 1
                counts.bytes_in += size
    counts.malformed = len(malformed.found)
    counts.malformed_examples = [list(pair) for pair in malformed.found[:_EXAMPLES]]
    with replacing(work / f"malformed-{shard.number:05d}.log") as file:
        for place, why in malformed.found:
            file.write(_json_line({"place": place, "why": why}))
    write_atomically(counts_file(work, shard.number), json.dumps(asdict(counts), sort_keys=True).encode())
    return counts


def _dropped(document: Document, drop: Drop, text: str | None) -> bytes:
    fields: dict[str, Any] = {"id": document.id, "reason": drop.reason, **drop.evidence}
    if document.scores:
        fields["scores"] = document.scores
    return _json_line(fields if text is None else {**fields, "text": text})


def _json_line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"

"""Documents for the tests of `curate`, made from a seed, and readers of what a step wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import zstandard
from rich.console import Console

from phi_fast.curation.documents import Document
from phi_fast.curation.run import Report, Running, run
from phi_fast.curation.shards import Reading

QUIET = Console(quiet=True)
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "il")]


def words(seed: int, count: int) -> list[str]:
    """Random words of a small language."""
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(count)]


def text(seed: int, count: int = 120) -> str:
    """A text of so many words, in lines."""
    found = words(seed, count)
    return "\n".join(" ".join(found[i : i + 12]) for i in range(0, count, 12))


def changed(original: str, share: float, seed: int) -> str:
    """The text with a share of its words replaced, all in one place, so that n-grams elsewhere stay."""
    parts = original.split(" ")
    count = round(share * len(parts))
    first = random.Random(seed).randrange(len(parts) - count + 1)
    parts[first : first + count] = words(seed + 10**6, count)
    return " ".join(parts)


def write_lines(path: Path, records: list[dict[str, Any] | bytes]) -> Path:
    """Write JSON lines; bytes are written as they are."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def parts(out: Path) -> list[dict[str, Any]]:
    """All documents that a step kept, in order."""
    found = []
    for part in sorted(out.glob("part-*.jsonl.zst")):
        with zstandard.open(part, "rt", encoding="utf-8") as file:
            found += [json.loads(line) for line in file]
    return found


def log(out: Path, name: str) -> list[dict[str, Any]]:
    """The lines of dropped.log or malformed.log."""
    return [json.loads(line) for line in (out / f"{name}.log").read_text("utf-8").splitlines()]


def step(judge: Any, source: Path, out: Path, *, skip: bool = False, shard_bytes: int = 2**14, **more: Any) -> Report:
    """Run a step in this process, with small shards."""
    limit = more.pop("max_document_bytes", 2**20)
    reading = Reading(skip_malformed=skip, max_document_bytes=limit, text_field=more.pop("text_field", "text"))
    return run(judge, [source], out, Running(reading, shard_bytes, workers=more.pop("workers", 1), **more), QUIET)


def files(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def as_documents(texts: list[str]) -> list[Document]:
    return [Document(one, f"d{i}") for i, one in enumerate(texts)]

"""`prepare` end to end beside what `tokenizers` alone reaches on the same documents and cores.

The peer has the documents in memory as Python strings and drops its encodings; ours starts from a JSONL file and ends
with a shuffled, checksummed corpus on disk, the start of its worker processes included.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer

from benchmarks.harness import Results, Row, Subject
from phi_fast.data.preparation.pipeline import Settings, available_cores, prepare
from phi_fast.data.stdlib_corpus import read_sources, standard_library
from phi_fast.data.vocabulary import tokenizer

BATCH = 256
"""Documents in one call of the peer's."""


def load_documents(size: int) -> list[str]:
    """About `size` bytes of Python sources, the standard library's and its tests'; no document twice."""
    found = list(read_sources().values())
    tests = sorted((standard_library() / "test").rglob("*.py")) if size > sum(map(len, found)) else []
    for path in tests:
        found.append(path.read_text(encoding="utf-8", errors="replace"))
    documents: list[str] = []
    total = 0
    for document in found:
        if total >= size:
            break
        documents.append(document)
        total += len(document.encode())
    return documents


def seconds_of_tokenizers(documents: list[str], encoder: Tokenizer, fast: bool) -> float:
    """Its own threads on every core."""
    encode = encoder.encode_batch_fast if fast else encoder.encode_batch
    start = time.perf_counter()
    for first in range(0, len(documents), BATCH):
        encode(documents[first : first + BATCH], add_special_tokens=False)
    return time.perf_counter() - start


def seconds_of_prepare(source: Path, out: Path) -> float:
    start = time.perf_counter()
    prepare([source], out, Settings("phi-1.5"), console=Console(quiet=True))
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def test_prepare_beside_tokenizers(tmp_path: Path, full: bool, results: Results) -> None:
    documents = load_documents(40_000_000 if full else 200_000)
    size = sum(len(document.encode()) for document in documents)
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    encoder = tokenizer("phi-1.5")
    encoder.encode_special_tokens = True
    contenders: dict[str, Callable[[], float]] = {
        "phi_fast prepare": lambda: seconds_of_prepare(source, tmp_path / "out"),
        "tokenizers encode_batch": lambda: seconds_of_tokenizers(documents, encoder, fast=False),
        "tokenizers encode_batch_fast": lambda: seconds_of_tokenizers(documents, encoder, fast=True),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2 if full else 1):
        for name, seconds in contenders.items():
            times[name].append(seconds())
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [Row(name, times[name], extra={"MB/s": round(size / medians[name] / 1e6, 2)}) for name in contenders]
    config = {"documents": len(documents), "MB": round(size / 1e6, 1), "cores": available_cores()}
    results.add(Subject("prepare, phi-1.5's tokenizer", config, rows))
    ours, *others = medians.values()
    if full:
        assert ours <= 1.2 * min(others)

"""`prepare` end to end beside the speed of `tokenizers` alone, on the same documents and cores.

The peer has the documents in memory as Python strings and discards its encodings. `prepare` starts from a JSONL file
and ends with a shuffled, checksummed corpus on disk. Its start-up (worker processes, sending the tokenizer to each)
takes the same time for any size, and is timed on one document. The row's "MB/s" includes the start-up, "MB/s after it"
does not.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from benchmarks.harness import Results
from benchmarks.subjects import Row, Subject
from phi_fast.data.preparation.pipeline import Settings, available_cores, prepare
from phi_fast.data.stdlib_corpus import read_sources, standard_library
from phi_fast.data.vocabulary import tokenizer
from phi_fast.terminal import console as open_console

BATCH = 256
"""Documents per call of the peer."""


def load_documents(size: int) -> list[str]:
    """About `size` bytes of Python sources, no document twice: the standard library, its tests, torch, transformers."""
    documents: list[str] = []
    total = 0
    folders = (standard_library() / "test", *(Path(str(module.__file__)).parent for module in (torch, transformers)))
    more = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    for document in itertools.chain(
        read_sources().values(), (path.read_text(encoding="utf-8", errors="replace") for path in more)
    ):
        if total >= size:
            break
        documents.append(document)
        total += len(document.encode())
    return documents


def seconds_of_tokenizers(documents: list[str], encoder: Tokenizer) -> float:
    """Seconds that `tokenizers` takes with its own threads on every core, by the faster of its two calls."""
    encode = encoder.encode_batch_fast
    start = time.perf_counter()
    for first in range(0, len(documents), BATCH):
        encode(documents[first : first + BATCH], add_special_tokens=False)
    return time.perf_counter() - start


def seconds_of_prepare(source: Path, out: Path) -> float:
    start = time.perf_counter()
    prepare([source], out, Settings("phi-1.5"), console=open_console(quiet=True))
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def test_prepare_beside_tokenizers(tmp_path: Path, full: bool, results: Results) -> None:
    documents = load_documents(64_000_000 if full else 200_000)
    size = sum(len(document.encode()) for document in documents)
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    encoder = tokenizer("phi-1.5")
    encoder.encode_special_tokens = True
    contenders: dict[str, Callable[[], float]] = {
        "phi_fast prepare": lambda: seconds_of_prepare(source, tmp_path / "out"),
        "tokenizers encode_batch_fast": lambda: seconds_of_tokenizers(documents, encoder),
    }
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": documents[0]}) + "\n")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    starts: list[float] = []
    for _ in range(2 if full else 1):
        starts.append(seconds_of_prepare(one, tmp_path / "out"))
        for name, seconds in contenders.items():
            times[name].append(seconds())
    start = statistics.median(starts)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [Row(name, times[name], extra={"MB/s": round(size / medians[name] / 1e6, 2)}) for name in contenders]
    ours, theirs = medians.values()
    rows[0].extra |= {"start s": round(start, 2), "MB/s after it": round(size / (ours - start) / 1e6, 2)}
    config = {"documents": len(documents), "MB": round(size / 1e6, 1), "cores": available_cores()}
    results.add(Subject("prepare, phi-1.5's tokenizer", config, rows))
    if full:
        assert ours - start <= 1.2 * theirs

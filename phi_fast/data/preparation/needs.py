"""What preparing a corpus needs: bytes over the network, room on the disk, and time."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tokenizers import Tokenizer

from .containers import PrepareError
from .inputs import Input, Inputs
from .remote import RemotePath
from .tasks import parquet_metadata

BYTES_PER_TOKEN = 3.0
"""Bytes per token, estimated low so that the disk suffices: phi's tokenizer gives 3.5 on the sources of Python 3.11's
standard library, measured. Texts in other scripts, or dense in symbols, have fewer."""
EXPANSION = 5.0
"""Estimated bytes of text per byte of a compressed text or JSONL file."""
NETWORK = 100e6
"""Bytes per second with which the time of a download is stated: about 1 Gbit/s."""


@dataclass(frozen=True)
class Needs:
    """Estimates for one corpus."""

    name: str
    files: int
    network: int
    """Bytes to be received."""
    text: int
    """Bytes of text, not compressed."""
    documents: int
    """Number of documents; 0 if it is not known."""
    begun: int = 0
    """Bytes on disk that an interrupted run left, and which are used."""

    def tokens(self) -> int:
        return round(self.text / BYTES_PER_TOKEN)

    def corpus(self, width: int) -> int:
        """Bytes of the finished corpus, with tokens of `width` bytes."""
        return self.tokens() * width + 8 * self.documents

    def work(self, width: int) -> int:
        """Bytes of the encoded units, which exist beside the corpus while it is merged, and are removed after."""
        return self.tokens() * width + 16 * self.documents


def measure(name: str, inputs: Inputs, text_field: str, partial: Path) -> Needs:
    """Estimate the needs of a corpus made of these inputs. Raises RemoteError, and what pyarrow raises."""
    tables = [entry for entry in inputs.read if entry.kind == "parquet"]
    with ThreadPoolExecutor(16) as pool:  # of a remote file it takes two requests
        columns = list(pool.map(lambda entry: _column(entry, text_field), tables))
    others = [entry for entry in inputs.read if entry.kind != "parquet"]
    received = sum(packed for entry, (packed, _, _) in zip(tables, columns, strict=True) if _remote(entry))
    return Needs(
        name=name,
        files=len(inputs.read),
        network=received + sum(entry.size for entry in others if _remote(entry)),
        text=sum(text for _, text, _ in columns)
        + round(sum(entry.size * (EXPANSION if entry.compressed else 1) for entry in others)),
        documents=sum(rows for _, _, rows in columns),
        begun=sum(file.stat().st_size for file in partial.glob("*") if file.is_file()) if partial.is_dir() else 0,
    )


def _remote(entry: Input) -> bool:
    return isinstance(entry.path, RemotePath)


def _column(entry: Input, text_field: str) -> tuple[int, int, int]:
    """(bytes stored, bytes not compressed, rows) of a Parquet file's column of text."""
    metadata = parquet_metadata(entry.path)
    stored = text = 0
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
        for column in columns:
            if column.path_in_schema == text_field:
                stored, text = stored + column.total_compressed_size, text + column.total_uncompressed_size
    return stored, text, metadata.num_rows


def disk_needed(corpora: Sequence[Needs], width: int) -> int:
    """Most bytes that making the corpora in turn takes beyond what is on the disk."""
    most = kept = 0
    for needs in corpora:
        most = max(most, kept + needs.corpus(width) + needs.work(width) - needs.begun)
        kept += needs.corpus(width) - needs.begun
    return max(0, most)


def encoding_speed(encoder: Tokenizer) -> float:
    """Bytes of text that one core encodes per second, measured on a module of the standard library for a moment."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    begin, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - begin < 0.2:
        encoder.encode_batch_fast([text], add_special_tokens=False)
        done += len(text)
    return done / (time.perf_counter() - begin)


def report(corpora: Iterable[Needs], width: int, speed: float, workers: int, out: Path) -> list[str]:
    """Lines that state the needs, for a person."""
    corpora = list(corpora)
    text, network = sum(needs.text for needs in corpora), sum(needs.network for needs in corpora)
    lines = [
        f"{needs.name}: {needs.files:,} files, {size(needs.network)} to receive, {size(needs.text)} of text, at most "
        f"about {needs.tokens() / 1e9:,.3g} B tokens"
        + (f"; {size(needs.begun)} are done, from a run before" if needs.begun else "")
        for needs in corpora
    ]
    return [
        *lines,
        f"disk: {size(disk_needed(corpora, width))} at {out}, of which {size(sum(n.corpus(width) for n in corpora))} "
        f"stay; free: {size(free(out))}",
        f"network: {size(network)}, {duration(network / NETWORK)} at {NETWORK / 1e6:.0f} MB/s",
        f"time: {duration(text / speed / workers)} to encode on {workers} cores at {speed / 1e6:.1f} MB/s each, "
        "measured now; the network's time runs beside it",
    ]


def check_disk(corpora: Sequence[Needs], width: int, out: Path) -> None:
    """Raise PrepareError if the disk is too small."""
    if (needed := disk_needed(corpora, width)) > free(out):
        raise PrepareError(
            f"{out} needs {size(needed)}, and its disk has {size(free(out))} free: name an --out on a larger disk, or "
            "prepare the corpora one by one, from a part of their files: docs/prepare.md"
        )


def free(out: Path) -> int:
    """Bytes free on the disk of a path that need not exist yet."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def size(count: int) -> str:
    """A number of bytes for a person."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """A time for a person."""
    return str(timedelta(seconds=round(seconds))) if seconds >= 1 else "less than a second"

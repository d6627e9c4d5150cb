"""Exact deduplication: of the documents with one normalized text, the first is kept.

Each document takes 24 bytes on disk. The hashes are compared range by range, each of a size that memory is given for.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import surveys
from .documents import Document
from .steps import Duplicates

_Array = np.ndarray[Any, Any]
_ROW = np.dtype([("key", "<u8"), ("rest", "<u8"), ("document", "<i8")])
_SPACES = re.compile(r"\s+")


def normalized(text: str) -> str:
    """Return what two equal documents have in common: lower case, NFC, and one space where there is white space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _SPACES.sub(" ", text.lower()).strip()


class ExactDuplicates:
    """Drops documents whose normalized text an earlier document has, by 128-bit BLAKE2b hashes."""

    name = "exact-dedup"

    def settings(self) -> dict[str, Any]:
        return {"normalization": "lower case, NFC, single spaces", "hash": "blake2b-128"}

    def survey(self, documents: Sequence[Document]) -> dict[str, _Array]:
        """Hash documents: "hash" (documents, 2) uint64."""
        hashes = [
            hashlib.blake2b(normalized(document.text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for document in documents
        ]
        return {"hash": np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)}

    def write_survey(self, path: Path, rows: dict[str, _Array]) -> None:
        """Write `path`.keys: 24 bytes for each document, sorted by hash."""
        hashed = rows["hash"]
        keys = np.empty(len(hashed), _ROW)
        keys["key"], keys["rest"], keys["document"] = hashed[:, 0], hashed[:, 1], np.arange(len(hashed))
        keys.sort(order=("key", "rest", "document"))
        surveys.save(path.with_suffix(".keys"), keys)

    def decide(self, surveyed: Sequence[tuple[Path, int]], memory: int) -> Duplicates:
        """Find the documents whose hash an earlier one has. Takes `memory` bytes, and 16 for each duplicate."""
        first = 0
        files = []
        for path, documents in surveyed:
            files.append((path.with_suffix(".keys"), first))
            first += documents
        dropped, of = [], []
        for rows in surveys.partitions(files, _ROW, memory // 3):  # sorting needs a copy and an index
            order = np.lexsort((rows["document"], rows["rest"], rows["key"]))
            rows = rows[order]
            same = (rows["key"][1:] == rows["key"][:-1]) & (rows["rest"][1:] == rows["rest"][:-1])
            # The first row of each run of equal hashes is the earliest document.
            heads = np.maximum.accumulate(np.where(np.concatenate(([False], same)), 0, np.arange(len(rows))))
            repeated = np.flatnonzero(same) + 1
            dropped.append(rows["document"][repeated])
            of.append(rows["document"][heads[repeated]])
        all_dropped = np.concatenate([np.empty(0, np.int64), *dropped])
        order = np.argsort(all_dropped, kind="stable")
        return Duplicates(all_dropped[order], np.concatenate([np.empty(0, np.int64), *of])[order], {})

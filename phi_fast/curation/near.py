"""Near deduplication: MinHash signatures (rensa) of word n-grams, banded (LSH), and each candidate pair checked.

Documents are compared by the Jaccard similarity of their sets of word 5-grams. Two whose signatures agree in one band
of `rows` hashes are candidates: with similarity s, that happens with probability 1 - (1 - s^rows)^bands. Candidates
whose whole signatures estimate a similarity below the threshold are not duplicates. Of each group of duplicates,
linked directly or by others, the first document is kept. Sources: Broder 1997; Leskovec, Rajaraman, Ullman, Mining of
Massive Datasets, ch. 3; the defaults (5-grams, 14 bands of 8) are those of datatrove and of FineWeb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.splitmix import GAMMA, mix
from . import surveys
from .clusters import Clusters
from .documents import CurateError, Document
from .extras import require
from .steps import Duplicates
from .words import ngrams, words_of

_Array = np.ndarray[Any, Any]
_ROW = np.dtype([("key", "<u8"), ("document", "<i8")])
_ROUNDS = 64
"""Documents of one bucket that the others are compared with, at most."""


@dataclass(frozen=True)
class NearSettings:
    """What is a near duplicate."""

    ngram: int = 5
    """Words in a row that are one element of a document's set."""
    bands: int = 14
    """Bands of a signature; two documents that agree in one are compared."""
    rows: int = 8
    """Hashes in a band."""
    threshold: float = 0.72
    """Least estimated Jaccard similarity of duplicates; (1 / 14)^(1 / 8) is about where banding finds half of them."""
    seed: int = 1
    """Seed of the hash functions."""

    def check(self) -> None:
        """Raise CurateError for an invalid value."""
        for name, least in (("ngram", 1), ("bands", 1), ("rows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise CurateError(f"{name}={getattr(self, name)}: expected {least} or more")
        if not 0 < self.threshold <= 1:
            raise CurateError(f"threshold={self.threshold}: expected a similarity above 0 and at most 1")


class NearDuplicates:
    """Drops documents that nearly repeat an earlier one."""

    name = "near-dedup"

    def __init__(self, settings: NearSettings = NearSettings()) -> None:
        """Take the settings. Raises CurateError for invalid ones, and if rensa is not installed."""
        settings.check()
        require("rensa", "near deduplication")
        self._settings = settings

    def settings(self) -> dict[str, Any]:
        import importlib.metadata

        return {**asdict(self._settings), "rensa": importlib.metadata.version("rensa")}

    def survey(self, documents: Sequence[Document]) -> dict[str, _Array]:
        """Compute "signature" (documents, bands * rows) uint32, and "empty" (documents,) bool: it has no words."""
        from rensa import RMinHash

        settings = self._settings
        sets = [ngrams(words_of(document.text).hashes, settings.ngram) for document in documents]
        lengths = [len(found) for found in sets]
        offsets = np.cumsum([0, *lengths], dtype=np.uint64)
        flat = np.concatenate([np.empty(0, np.uint64), *sets])
        size = settings.bands * settings.rows
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, size, settings.seed)
        signature = np.array(matrix.to_rows(), "<u4").reshape(len(documents), size)
        return {"signature": signature, "empty": np.array(lengths, np.int64) == 0}

    def write_survey(self, path: Path, rows: dict[str, _Array]) -> None:
        """Write `path`.bands (16 bytes for each band, sorted) and `path`.signatures (4 bytes for each hash)."""
        bands = self._band_keys(rows["signature"])[~rows["empty"]]
        table = np.empty(bands.size, _ROW)
        table["key"] = bands.reshape(-1)
        table["document"] = np.repeat(np.flatnonzero(~rows["empty"]), self._settings.bands)
        table.sort(order=("key", "document"))
        surveys.save(path.with_suffix(".signatures"), rows["signature"])
        surveys.save(path.with_suffix(".bands"), table)

    def decide(self, surveyed: Sequence[tuple[Path, int]], memory: int) -> Duplicates:
        """Find the near duplicates. Takes some `memory` bytes, and 24 for each document."""
        counts = [documents for _, documents in surveyed]
        firsts = np.cumsum([0, *counts])
        signatures = _Signatures(
            [path.with_suffix(".signatures") for path, _ in surveyed],
            firsts,
            self._settings.bands * self._settings.rows,
        )
        clusters = Clusters(int(firsts[-1]))
        files = [(path.with_suffix(".bands"), int(first)) for (path, _), first in zip(surveyed, firsts, strict=False)]
        notes = {"pairs_compared": 0, "pairs_below_threshold": 0, "documents_not_compared": 0}
        for rows in surveys.partitions(files, _ROW, memory // 8):  # sorting and the signatures of pairs need the rest
            rows = rows[np.lexsort((rows["document"], rows["key"]))]
            self._compare(rows["key"], rows["document"], signatures, clusters, notes, memory // 4)
        dropped, of = clusters.duplicates()
        return Duplicates(dropped, of, notes)

    def _band_keys(self, signature: _Array) -> _Array:
        """Hash each band: (documents, bands) uint64; equal bands of different numbers differ."""
        settings = self._settings
        split = signature.reshape(-1, settings.bands, settings.rows).astype(np.uint64)
        keys = np.broadcast_to(np.arange(settings.bands, dtype=np.uint64), split.shape[:2])
        for i in range(settings.rows):
            keys = mix(keys + GAMMA + split[:, :, i])
        return keys

    def _compare(
        self,
        keys: _Array,
        documents: _Array,
        signatures: _Signatures,
        clusters: Clusters,
        notes: dict[str, int],
        memory: int,
    ) -> None:
        """Join the similar documents of each bucket: those with one key, in ascending order.

        In each round, the first document of every bucket is compared with the bucket's others. Those that are similar
        to it, or already in its cluster, are done; the others go on to the next round."""
        for _ in range(_ROUNDS):
            heads, members = _pairs(keys)
            if not len(members):
                return
            left, right = documents[heads], documents[members]
            apart = ~clusters.joined(left, right)
            similar = np.ones(len(members), bool)
            similar[apart] = self._similar(left[apart], right[apart], signatures, memory)
            notes["pairs_compared"] += int(apart.sum())
            notes["pairs_below_threshold"] += int((~similar).sum())
            clusters.join(left[similar & apart], right[similar & apart])
            rest = members[~similar]
            keys, documents = keys[rest], documents[rest]
        notes["documents_not_compared"] += len(keys)

    def _similar(self, left: _Array, right: _Array, signatures: _Signatures, memory: int) -> _Array:
        """Tell which pairs of documents have signatures that agree in at least the threshold's share of hashes."""
        pairs, index = np.unique(np.stack([left, right]), axis=1, return_inverse=True)
        share = np.empty(pairs.shape[1])
        step = max(1, memory // (16 * signatures.size))
        for first in range(0, len(share), step):
            some = slice(first, first + step)
            share[some] = (signatures.read(pairs[0, some]) == signatures.read(pairs[1, some])).mean(1)
        similar: _Array = (share >= self._settings.threshold)[index.reshape(-1)]
        return similar


def _pairs(keys: _Array) -> tuple[_Array, _Array]:
    """Pair the first of each run of equal keys with each other of the run: two arrays of positions."""
    same = np.concatenate(([False], keys[1:] == keys[:-1])) if len(keys) else np.empty(0, bool)
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(keys)))) if len(keys) else np.empty(0, np.int64)
    members = np.flatnonzero(same)
    return heads[members], members


class _Signatures:
    """Reads signatures of documents anywhere in the survey's files."""

    def __init__(self, files: list[Path], firsts: _Array, size: int) -> None:
        self._files, self._firsts, self.size = files, firsts, size

    def read(self, documents: _Array) -> _Array:
        """Read (documents, hashes) uint32."""
        found = np.empty((len(documents), self.size), "<u4")
        shards = np.searchsorted(self._firsts, documents, side="right") - 1
        order = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            some = order[start:stop]
            shard = shards[some[0]]
            # The file is this process's own, in a locked folder: nobody cuts it short while it is mapped.
            rows = np.memmap(self._files[shard], "<u4", "r").reshape(-1, self.size)
            found[some] = rows[documents[some] - self._firsts[shard]]
        return found

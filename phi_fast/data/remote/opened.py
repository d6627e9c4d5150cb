"""Opens the cached files of remote corpora, and finds the bytes of them that rows need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from phi_fast._C import tokens as _tokens

from ...errors import UsageError
from ..formats import TokenLayout
from .cache import CacheFolder
from .cached_file import CachedFile
from .feed import Feed, Need

LOOKAHEAD_ROWS = 512
"""Rows per rank that are fetched ahead of their use, unless the cache is too small for them: enough to bridge a read
that fails a few times."""


def cached_tokens(layout: TokenLayout, cache: CacheFolder | None = None) -> CachedFile | None:
    """The cached file of a layout's tokens; None if the layout's file is complete."""
    if layout.url is None:
        return None
    cache = cache or CacheFolder(layout.path.parent.parent)
    end = layout.offset + layout.bytes
    return CachedFile(cache, layout.path, layout.url, layout.sha256, layout.block_bytes, layout.offset, end)


def cached_marks(layout: TokenLayout, cache: CacheFolder | None = None) -> CachedFile | None:
    """The cached file of a layout's marks; None if there are none, or they are complete."""
    if layout.marks is None or layout.marks_url is None:
        return None
    cache = cache or CacheFolder(layout.marks.parent.parent)
    return CachedFile(cache, layout.marks, layout.marks_url, layout.marks_sha256, layout.block_bytes, 0, layout.tokens)


class CachedRows:
    """What rows of a mixture need of the corpora that are cached."""

    def __init__(self, layouts: Sequence[TokenLayout], order: _tokens.Order, sequence_length: int) -> None:
        self._layouts, self._order, self._length = layouts, order, sequence_length
        self.open()

    def open(self) -> None:
        """Open the cached files, also anew in a forked process, where locks are in an arbitrary state."""
        caches: dict[Path, CacheFolder] = {}
        self._of_corpus: list[list[tuple[CachedFile, int, int]]] = []
        """For each corpus its cached files, with their bytes before the first token and per token."""
        for layout in self._layouts:
            if layout.url is None:
                self._of_corpus.append([])
                continue
            folder = layout.path.parent.parent
            cache = caches[folder] = caches.get(folder) or CacheFolder(folder)
            tokens, marks = cached_tokens(layout, cache), cached_marks(layout, cache)
            assert tokens is not None
            self._of_corpus.append([(tokens, layout.offset, layout.width), *([] if marks is None else [(marks, 0, 1)])])
        self._caches = list(caches.values())

    def needs(self, first: int, count: int) -> Iterator[Need]:
        """The bytes of cached files that `count` rows of the stream need, from row `first` on."""
        for row in range(first, first + count):
            corpus, _, _, _, token = self._order.at(row)
            for file, offset, width in self._of_corpus[corpus]:
                start = offset + token * width
                yield Need(file, start, start + (self._length + 1) * width)

    def window(self, batch: int, least: int) -> int:
        """Number of batches to fetch ahead: LOOKAHEAD_ROWS rows, or as many as fit into half of the cache together
        with those of the other ranks of this machine.

        Raises UsageError if fewer than `least` do.
        """
        wanted = max(least, -(-LOOKAHEAD_ROWS // batch))
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        files = [part for parts in self._of_corpus for part in parts]
        for cache in self._caches:
            mine = [(file, width) for file, _, width in files if file.cache is cache]
            if sum(file.index.blocks * file.index.block_bytes for file, _ in mine) <= cache.limit_bytes:
                continue  # all of it stays there
            of_row = max(
                sum(
                    (-(-(self._length + 1) * width // file.index.block_bytes) + 1) * file.index.block_bytes
                    for file, _, width in parts
                    if file.cache is cache
                )
                for parts in self._of_corpus
            )
            fit = cache.limit_bytes // (2 * ranks * batch * of_row)
            if fit < least:
                needed = 2 * ranks * batch * of_row * least / 1e9
                raise UsageError(
                    f"a cache of {cache.limit_bytes / 1e9:g} GB at {cache.directory} is too small for the {least} "
                    f"batches that {ranks} ranks on this machine hold at a time: give --data-cache-gb {needed:.3g} or "
                    "more, or a smaller micro-batch"
                )
            wanted = min(wanted, fit)
        return wanted

    def feed(self, batch: int, stride: int, least: int) -> Feed:
        """Start to fetch ahead for batches of `batch` rows, `stride` rows apart, at least `least` of them."""
        return Feed(lambda first: self.needs(first, batch), stride, self.window(batch, least))

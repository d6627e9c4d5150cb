"""The order and the errors of what is fetched ahead, with files that answer when they are told to."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from phi_fast.data.remote.feed import Feed, Need


class Blocks:
    """A stand-in for a CachedFile of 100 blocks of one byte."""

    def __init__(self) -> None:
        self.there = np.zeros(100, np.uint32)
        self.index = SimpleNamespace(touch=lambda blocks: None)
        self.asked: list[int] = []
        self.go, self.began = threading.Event(), threading.Event()
        self.failures = 0
        """Number of calls of `bring` that fail from now on."""

    def blocks(self, start: int, stop: int) -> range:
        return range(start, stop)

    def versions(self, blocks: range) -> np.ndarray | None:
        found = self.there[blocks.start : blocks.stop]
        return found.copy() if found.all() else None

    def unchanged(self, blocks: range, versions: np.ndarray) -> bool:
        return bool((self.there[blocks.start : blocks.stop] == versions).all())

    def bring(self, blocks: range) -> None:
        self.asked += blocks
        self.began.set()
        assert self.go.wait(20)
        if self.failures:
            self.failures -= 1
            raise OSError("away")
        self.there[blocks.start : blocks.stop] += 1


def feed(file: Blocks, threads: int = 1, window: int = 3) -> Feed:
    """Batch i needs the blocks 10 - i and 11 - i."""
    return Feed(lambda row: [Need(file, 10 - row, 12 - row)], 1, window, threads)


def test_blocks_are_fetched_once_and_in_the_order_of_their_use() -> None:
    file = Blocks()
    ahead = feed(file)
    ahead.start(0)
    assert not ahead.ready(0, wait=False)
    file.go.set()
    for row in range(5):
        assert ahead.ready(row, wait=True) and ahead.intact(row)
    assert ahead.ready(7, wait=True)
    assert file.asked[:7] == [10, 11, 9, 8, 7, 6, 5]
    assert len(set(file.asked)) == len(file.asked)
    ahead.close()


def test_a_removed_block_is_fetched_again() -> None:
    file = Blocks()
    ahead = feed(file)
    file.go.set()
    ahead.start(0)
    assert ahead.ready(0, wait=True)
    file.there[11] = 0
    assert not ahead.intact(0)
    ahead.start(0)
    assert ahead.ready(0, wait=True) and ahead.intact(0)
    assert file.asked.count(11) == 2
    ahead.close()


def test_an_error_is_raised_for_the_batch_that_needs_it_and_then_tried_again() -> None:
    file = Blocks()
    ahead = feed(file)
    file.failures = 1
    file.go.set()
    ahead.start(0)
    with pytest.raises(OSError, match="away"):
        ahead.ready(0, wait=True)
    assert ahead.ready(0, wait=True) and ahead.intact(0)
    ahead.close()


def test_an_error_of_a_fetch_from_before_a_seek_is_not_raised_after_it() -> None:
    file = Blocks()
    ahead = feed(file)
    ahead.start(0)
    assert file.began.wait(20)
    ahead.start(0)
    file.failures = 1
    file.go.set()
    assert ahead.ready(0, wait=True) and ahead.intact(0)
    ahead.close()


def test_waiting_ends_when_the_loader_is_closed() -> None:
    ahead = feed(Blocks())
    ahead.start(0)
    threading.Timer(0.05, ahead.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        ahead.ready(0, wait=True)
    assert not ahead.ready(0, wait=False)

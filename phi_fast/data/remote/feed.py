"""Fetches the blocks of the next batches of a loader, in their order, ahead of their use.

Which rows follow is a function of one integer, so the blocks that the next batches need are known exactly.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .cached_file import CachedFile

FETCHERS = 32
"""Number of threads that fetch. They mostly wait: at 20 ms per request they read 1,600 blocks per second."""
PATIENCE = 0.5
"""Seconds that `Feed.close` waits for fetches in progress, which healthy servers answer sooner."""


class Need(NamedTuple):
    """Bytes start ... stop - 1 of a cached file."""

    file: CachedFile
    start: int
    stop: int


@dataclass(eq=False)
class _Job:
    """Consecutive blocks of one file, to be fetched by one thread."""

    file: CachedFile
    blocks: range
    start: int
    """Number of calls of `Feed.start` before it began."""
    plans: list[_Plan] = field(default_factory=list)
    """The batches that wait for them."""


@dataclass(eq=False)
class _Plan:
    """What a batch needs."""

    needs: list[tuple[CachedFile, range]]
    waits: int = 0
    """Number of jobs that are not done."""
    error: Exception | None = None
    versions: list[Any] | None = None
    """Versions of the blocks when they were all there."""


class Feed:
    """Keeps the blocks of the next `window` batches in the cache.

    needs: what the batch whose first row is given reads from cached files. stride: rows from one batch to the next.

    One thread calls `ready` and `intact`, for batches in ascending order, beginning at the row given to `start`.
    """

    def __init__(
        self, needs: Callable[[int], Iterable[Need]], stride: int, window: int, threads: int = FETCHERS
    ) -> None:
        self._needs, self._stride, self._window = needs, stride, window
        lock = threading.Lock()
        self._changed, self._queued = threading.Condition(lock), threading.Condition(lock)
        """Notified when a job is done, and when one is added."""
        self._jobs: deque[_Job] = deque()
        self._pending: dict[tuple[int, int], _Job] = {}
        self._plans: dict[int, _Plan] = {}
        self._closed, self._process = False, os.getpid()
        self._next = self._starts = 0
        self._threads = [threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def start(self, row: int) -> None:
        """Let the next batch begin at `row`; what was planned before is not fetched any more."""
        with self._changed:
            for job in self._jobs:
                self._forget(job)
            self._jobs.clear()
            self._plans.clear()
            self._next, self._starts = row, self._starts + 1
            self._extend()

    def ready(self, row: int, *, wait: bool) -> bool:
        """Whether all blocks of the batch at `row` are there.

        wait: until they are. Then it raises what stopped a fetch (`CachedFile.bring`), and the next call tries again,
        or RuntimeError after `close`.
        """
        with self._changed:
            while not self._closed:
                plan = self._plans.get(row) or self._plan(row)
                if plan.error is not None and wait:
                    del self._plans[row]
                    raise plan.error
                if not plan.waits and plan.error is None:
                    versions = [file.versions(blocks) for file, blocks in plan.needs]
                    if all(found is not None for found in versions):
                        plan.versions = versions
                        return True
                    self._plan(row)  # something was removed meanwhile
                elif not wait:
                    return False
                else:
                    self._changed.wait(0.2)
            if wait:
                raise RuntimeError("the loader is closed; make a new one")
            return False

    def intact(self, row: int) -> bool:
        """Whether nothing of the batch at `row` was removed since it was ready: then what was read is what was fetched.

        Ends the plan of that batch, and plans one more.
        """
        with self._changed:
            plan = self._plans.pop(row)
            assert plan.versions is not None
            for file, blocks in plan.needs:
                file.index.touch(slice(blocks.start, blocks.stop))
            self._extend()
        pairs = zip(plan.needs, plan.versions, strict=True)
        return all(file.unchanged(blocks, versions) for (file, blocks), versions in pairs)

    def close(self) -> None:
        """Stop fetching, and wait up to PATIENCE for what is being fetched. A thread that waits longer for a server
        ends when it answers. In a forked process, which has none of the threads, this does nothing."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
            self._queued.notify_all()
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _extend(self) -> None:
        while len(self._plans) < self._window:
            self._plan(self._next)
            self._next += self._stride

    def _plan(self, row: int) -> _Plan:
        """Plan a batch, and add jobs for what is not there."""
        needs = [(need.file, need.file.blocks(need.start, need.stop)) for need in self._needs(row)]
        plan = self._plans[row] = _Plan(needs)
        jobs: set[_Job] = set()
        for file, blocks in needs:
            file.index.touch(slice(blocks.start, blocks.stop))
            added: _Job | None = None  # to which the next block may be added
            for block in blocks:
                pending = self._pending.get((id(file), block))
                if pending is not None:
                    jobs.add(pending)
                if pending is not None or file.versions(range(block, block + 1)) is not None:
                    added = None
                    continue
                if added is None:
                    added = _Job(file, range(block, block), self._starts)
                    self._jobs.append(added)
                    self._queued.notify()
                    jobs.add(added)
                added.blocks = range(added.blocks.start, block + 1)
                self._pending[id(file), block] = added
        for job in jobs:
            job.plans.append(plan)
        plan.waits = len(jobs)
        return plan

    def _forget(self, job: _Job) -> None:
        for block in job.blocks:
            self._pending.pop((id(job.file), block), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._closed:
                        return
                    self._queued.wait()
                job = self._jobs.popleft()
            error: Exception | None = None
            try:
                job.file.bring(job.blocks)
            except Exception as raised:  # for the thread that needs the batch
                error = raised
            with self._changed:
                if error is not None and job.start < self._starts:
                    job.start = self._starts  # batches planned since have waited for its last attempts only
                    self._jobs.appendleft(job)
                    self._queued.notify()
                    continue
                self._forget(job)
                for plan in job.plans:
                    plan.waits -= 1
                    plan.error = plan.error or error
                self._changed.notify_all()

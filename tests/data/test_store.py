"""A mixture the size of 150 B tokens: opening and seeking are fast and need little memory, as does reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from token_files import draw_tokens, write_corpus

from phi_fast.data import Mixture, TokenLoader, count_rows

TOKENS = 150_000_000_000


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Sparse token files with a total size of 300 GB."""
    folder = tmp_path_factory.mktemp("sparse")
    paths = {"synthetic": (folder / "synthetic.bin", 4), "phi-1": (folder / "phi-1.bin", 1)}
    for (path, _), share in zip(paths.values(), (80, 20), strict=True):
        with path.open("wb") as file:
            file.truncate(2 * TOKENS * share // 100)
    return Mixture.of(paths, dtype="uint16")


def fastest(action, repeats=5):
    """Seconds of the fastest of several runs: other work on this machine can only add time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("mode", ["auto", "mmap", "pread"])
def test_opens_and_seeks_at_once(sparse, mode):
    assert fastest(lambda: TokenLoader(sparse, 2048, 8, mode=mode).close()) < 0.1
    with TokenLoader(sparse, 2048, 8, mode=mode) as loader:
        next(loader)
        targets = iter([1, 10**15, 12345, 10**7, 35_763 * 2048])
        assert fastest(lambda: loader.seek(next(targets))) < 0.001
        assert next(loader).rows.start > 0


def test_opens_the_longest_period_at_once(tmp_path):
    corpus = write_corpus(tmp_path / "c", draw_tokens(5000))
    mixture = Mixture.of({str(i): (corpus, 80_000 + i) for i in range(12)})
    assert fastest(lambda: TokenLoader(mixture, 128, 1).close()) < 0.25


def memory_while(mixture, length, gigabytes, mode):
    """MB by which a process grows at most while it reads: without mapped pages, and with them."""
    program = f"""
        import json
        from phi_fast.data import Mixture, TokenLoader

        def megabytes(field):
            status = open("/proc/self/status").read()
            return int(status.split(field + ":")[1].split()[0]) / 1024

        mixture = Mixture.of({ {c.name: (str(c.path), c.weight) for c in mixture.components}!r}, dtype="uint16")
        import torch; torch.empty(8).clone()
        own, rss = megabytes("RssAnon"), megabytes("VmRSS")
        loader = TokenLoader(mixture, {length}, 4, mode={mode!r})
        most_own = most_rss = 0
        for i in range(int({gigabytes} * 1e9 / (2 * 4 * {length}))):
            next(loader)
            if i % 50 == 0:
                most_own, most_rss = max(most_own, megabytes("RssAnon")), max(most_rss, megabytes("VmRSS"))
        print(json.dumps([most_own - own, most_rss - rss]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("mode", ["auto", "mmap"])
def test_memory_is_bounded_while_1_gb_is_read(sparse, mode):
    own, rss = memory_while(sparse, 16384, 1, mode)
    assert own < 50
    assert rss < (50 if mode == "auto" else 2 * 256 + 50)  # mapped: the pages of two files before they are released


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "mmap"])
def test_memory_is_bounded_while_10_gb_are_read(sparse, mode):
    own, rss = memory_while(sparse, 65536, 10, mode)
    assert own < 50
    assert rss < (50 if mode == "auto" else 2 * 256 + 50)


def test_counting_rows(sparse):
    assert count_rows(sparse.components[1].path, "train", 2048, dtype="uint16") == (TOKENS // 5 - 1) // 2048

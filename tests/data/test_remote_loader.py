"""Loaders of remote corpora: the rows of local ones, whatever servers, caches and other processes do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from remote_fixtures import http, new_bucket, no_waits, s3, s3_process  # noqa: F401
from remote_servers import Server, upload
from token_files import draw_tokens, write_corpus, write_marked

from phi_fast.data import DataCache, Mixture, TokenLoader, remote_corpus, sequential_rows
from phi_fast.data.store import CorpusError

LENGTH = 64
BLOCK = 4096
IDS = draw_tokens(200_000)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A corpus of 400,000 bytes: 98 blocks of the cache."""
    return write_corpus(tmp_path / "web", IDS)


@pytest.fixture(params=["s3", "http"])
def served(request: pytest.FixtureRequest, local: Path) -> tuple[Server, str]:
    """A server, and the URL of `local` on it."""
    server: Server = request.getfixturevalue(request.param)
    return server, upload(server, local, new_bucket(), "web") if request.param == "s3" else f"{server.url}/web"


def cache(tmp_path: Path, blocks: float = 1e6) -> DataCache:
    return DataCache(tmp_path / "cache", blocks * BLOCK / 1e9, block_bytes=BLOCK)


def rows(mixture: Mixture, count: int, start: int = 0, **options) -> torch.Tensor:
    """input_ids and labels of `count` batches, (count, 2, batch, length)."""
    with TokenLoader(mixture, LENGTH, 4, seed=3, **options) as loader:
        loader.seek(start)
        return torch.stack([torch.stack([batch.input_ids, batch.labels]) for batch, _ in zip(loader, range(count))])


def of(path: Path | str) -> Mixture:
    return Mixture.of({"web": (path, 1)})


@pytest.mark.parametrize("threads", [0, 2])
def test_the_rows_of_a_local_corpus(served: tuple[Server, str], local: Path, tmp_path: Path, threads: int) -> None:
    remote = remote_corpus(served[1], cache(tmp_path))
    assert torch.equal(rows(of(remote), 200, threads=threads), rows(of(local), 200))
    asked = served[0].ranges("train.bin")
    assert all(start % BLOCK == 0 for start, _ in asked[1:])  # the first asks for the size, over http
    assert sum(stop - start for start, stop in asked) <= 2 * IDS.size + BLOCK  # no block twice

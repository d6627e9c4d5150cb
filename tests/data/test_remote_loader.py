"""Loaders of remote corpora: the rows of local ones, whatever servers, caches and other processes do."""

from __future__ import annotations

import os
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from remote_fixtures import new_bucket
from token_files import draw_tokens, write_corpus, write_marked

from benchmarks.loopback import Server, upload
from phi_fast.data import DataCache, Mixture, TokenLoader, remote_corpus, sequential_rows
from phi_fast.data.store import CorpusError
from phi_fast.errors import UsageError

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
        return torch.stack([torch.stack([batch.input_ids, batch.labels]) for batch in islice(loader, count)])


def of(path: Path | str) -> Mixture:
    return Mixture.of({"web": (path, 1)})


def test_the_rows_of_a_local_corpus(served: tuple[Server, str], local: Path, tmp_path: Path) -> None:
    remote = remote_corpus(served[1], cache(tmp_path))
    kinds = iter(["error", "drop", "short"])
    served[0].fault = lambda method, path: next(kinds, None) if path.endswith("train.bin") else None
    expected = rows(of(local), 100)
    assert torch.equal(rows(of(remote), 100), expected)
    asked = served[0].ranges("train.bin")
    assert all(start % BLOCK == 0 for start, _ in asked[1:])  # the first asks for the size, over http
    assert sum(stop - start for start, stop in asked) <= 2 * IDS.size + 8 * BLOCK  # only those that failed twice
    served[0].requests.clear()
    assert torch.equal(rows(of(remote), 100, threads=0), expected)
    assert served[0].requests == []  # all of it was there
    with pytest.raises(UsageError, match=r"none/manifest\.json cannot be read"):
        remote_corpus(f"{served[1]}/none", cache(tmp_path))
    assert len(served[0].requests) <= 3  # it was not asked for again and again


@pytest.mark.parametrize("isolated", [False, True])
def test_marks_and_a_local_corpus_beside(http: Server, tmp_path: Path, isolated: bool) -> None:
    marks = np.random.default_rng(0).integers(0, 4, 300 * LENGTH + 1).astype("u1")
    chat = write_marked(tmp_path / "chat", draw_tokens(300 * LENGTH + 1, seed=1), marks, LENGTH)
    code = write_corpus(tmp_path / "code", draw_tokens(50_000, seed=2))
    remote = remote_corpus(f"{http.url}/chat", cache(tmp_path, blocks=40))
    found, expected = (
        TokenLoader(Mixture.of({"chat": (a, 2), "code": (code, 1)}), LENGTH, 3, document_isolation=isolated)
        for a in (remote, chat)
    )
    with found, expected:
        for a, b in zip(islice(found, 150), islice(expected, 150), strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert (a.rows, a.trained, a.components.tolist()) == (b.rows, b.trained, b.components.tolist())
            assert not isolated or torch.equal(a.cu_seqlens, b.cu_seqlens)
        assert found.state_dict() == expected.state_dict()


def test_resuming_at_any_row_from_either_kind_of_corpus(http: Server, local: Path, tmp_path: Path) -> None:
    remote = remote_corpus(f"{http.url}/web", cache(tmp_path))
    with TokenLoader(of(local), LENGTH, 4, seed=3) as there, TokenLoader(of(remote), LENGTH, 4, seed=3) as here:
        for row in (0, 4, 9_999, 2**40, 123_456, 3):
            here.seek(row)
            there.load_state_dict(here.state_dict())
            assert torch.equal(next(here).input_ids, next(there).input_ids)
            here.load_state_dict(there.state_dict())
            assert torch.equal(next(here).labels, next(there).labels)


def test_a_cache_smaller_than_the_corpus(http: Server, local: Path, tmp_path: Path) -> None:
    small = cache(tmp_path, blocks=50)
    remote = remote_corpus(f"{http.url}/web", small)
    with TokenLoader(of(remote), LENGTH, 1, seed=3, prefetch=2) as loader:
        for (expected, *_), batch in zip(rows(of(local), 250).unflatten(0, (-1, 1)), islice(loader, 250), strict=True):
            assert torch.equal(batch.input_ids, expected[0][:1])
            loader.seek(batch.rows.start + 4)
            on_disk = (remote / "train.bin").stat().st_blocks * 512
            assert on_disk <= small.limit_bytes
    asked = sum(stop - start for start, stop in http.ranges("train.bin"))
    assert asked > 2 * IDS.size  # blocks were removed, and fetched again


@pytest.mark.parametrize("kind", ["error", "drop", "short", "slow"])
@pytest.mark.parametrize("served", ["http", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_servers_that_fail_now_and_then(served: tuple[Server, str], local: Path, tmp_path: Path, kind: str) -> None:
    server, url = served
    remote = remote_corpus(url, cache(tmp_path))
    failures = iter([False, True, False, True, True, True] + [False, False, True] * 5)
    server.fault = lambda method, path: kind if path.endswith("train.bin") and next(failures, False) else None
    assert torch.equal(rows(of(remote), 40), rows(of(local), 40))
    assert next(failures, None) is None


def test_a_server_that_is_away_ends_the_run_with_its_url_and_the_rows_are_read_when_it_is_back(
    http: Server, local: Path, tmp_path: Path
) -> None:
    remote = remote_corpus(f"{http.url}/web", cache(tmp_path))
    with TokenLoader(of(remote), LENGTH, 4, seed=3) as loader:
        http.fault = lambda method, path: "error"
        with pytest.raises(CorpusError, match=rf"{http.url}/web/train.bin, bytes [\d,]+ to [\d,]+ could not be read"):
            next(loader)
        assert loader.row == 0
        http.reset()
        assert torch.equal(next(loader).input_ids, rows(of(local), 1)[0, 0])


def test_blocks_removed_while_a_batch_is_filled(http: Server, local: Path, tmp_path: Path, monkeypatch) -> None:
    """The batch then holds zeros in their place, and is read again."""
    expected = rows(of(local), 30)
    remote = remote_corpus(f"{http.url}/web", cache(tmp_path))
    with TokenLoader(of(remote), LENGTH, 4, seed=3, threads=0, prefetch=1) as loader:
        found = [torch.stack([first.input_ids, first.labels]) for first in [next(loader)]]
        file, removed = loader.store.cached._of_corpus[0][0][0], []
        start, take = loader._submit_ready, loader._prefetcher.take

        def take_from_holes():
            with file.cache.locked():
                removed.append(file.index.bytes)
                file.cache.drop(file.index, np.flatnonzero(file.index.present).tolist())
            return take()

        def submit_ready(*, wait: bool = True) -> None:
            start(wait=wait)
            if wait and len(removed) < 3:
                nonlocal take
                take = loader._prefetcher.take
                loader._prefetcher = type(
                    "Holes", (), {"take": staticmethod(take_from_holes), "close": lambda _: None}
                )()

        monkeypatch.setattr(loader, "_submit_ready", submit_ready)
        for _ in range(29):
            batch = next(loader)
            found.append(torch.stack([batch.input_ids, batch.labels]))
    assert len(removed) == 3 and min(removed) > 0
    assert torch.equal(torch.stack(found), expected)


def test_validation_rows(http: Server, local: Path, tmp_path: Path) -> None:
    remote = remote_corpus(f"{http.url}/web", cache(tmp_path, blocks=20))
    for (a, b), (c, d) in zip(
        sequential_rows(remote, "train", LENGTH, batch=200),
        sequential_rows(local, "train", LENGTH, batch=200),
        strict=True,
    ):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_a_url_in_a_mixture_is_read_through_the_cache_of_the_environment(
    http: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI_FAST_DATA_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PHI_FAST_DATA_CACHE_GB", "0.5")
    assert torch.equal(rows(of(f"{http.url}/web"), 5), rows(of(local), 5))
    assert [path.name[:4] for path in (tmp_path / "elsewhere").glob("*/train.bin")] == ["trai"]
    assert (tmp_path / "elsewhere" / "limit.json").read_text() == '{"limit_bytes": 500000000}'


def test_a_forked_child_reads_on_by_itself(http: Server, local: Path, tmp_path: Path) -> None:
    """It has none of the threads that fetch, and no lock of its parent."""
    expected = rows(of(local), 60)
    remote = remote_corpus(f"{http.url}/web", cache(tmp_path))
    with TokenLoader(of(remote), LENGTH, 4, seed=3) as loader:
        first = [torch.equal(next(loader).input_ids, expected[i, 0]) for i in range(5)]
        child = os.fork()
        if not child:
            signal.alarm(60)  # a deadlock ends it
            same = [torch.equal(next(loader).input_ids, expected[i, 0]) for i in range(5, 60)]
            os._exit(0 if all(same) else 1)
        same = [torch.equal(next(loader).input_ids, expected[i, 0]) for i in range(5, 60)]
        assert all(first) and all(same)
        assert os.waitpid(child, 0)[1] == 0

"""The cache of remote corpora: its limit, processes that share it or were killed, damage, and wrong input."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from token_files import draw_tokens, write_corpus

from benchmarks.loopback import Server
from phi_fast.data import DataCache, Mixture, TokenLoader, remote_corpus, remote_files
from phi_fast.data.remote import cache as cache_module
from phi_fast.data.remote.cached_file import CachedFile
from phi_fast.data.remote.origin import url_of
from phi_fast.data.store import CorpusError
from phi_fast.errors import UsageError

LENGTH, BLOCK = 64, 4096
IDS = draw_tokens(100_000, seed=5)
DATA = IDS.astype("<u2").tobytes()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "web", IDS)


def of(path: Path) -> Mixture:
    return Mixture.of({"web": (path, 1)})


def cached(folder: Path, cache: DataCache, url: str) -> CachedFile:
    return CachedFile(cache, folder / "train.bin", f"{url}/train.bin")


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


RANK = """
import sys, torch
from phi_fast.data import DataCache, Mixture, TokenLoader, remote_corpus
url, folder, rank, out = sys.argv[1:]
mixture = Mixture.of({"web": (remote_corpus(url, DataCache(folder, 12 * 4096 / 1e9, block_bytes=4096)), 1)})
with TokenLoader(mixture, 64, 1, int(rank), 2, seed=3, prefetch=2) as loader:
    torch.save([batch.input_ids for _, batch in zip(range(100), loader)], out)
"""


@pytest.mark.slow
def test_ranks_share_a_cache_that_is_too_small_for_them(http: Server, local: Path, tmp_path: Path) -> None:
    """Two processes remove each other's blocks all the time, and both get their rows."""
    outs = [tmp_path / f"rank-{rank}.pt" for rank in (0, 1)]
    readers = [start(RANK, f"{http.url}/web", tmp_path / "cache", rank, out) for rank, out in enumerate(outs)]
    assert [reader.wait() for reader in readers] == [0, 0]
    with TokenLoader(of(local), LENGTH, 2, seed=3) as loader:
        for *found, batch in zip(*map(torch.load, outs), islice(loader, 100), strict=True):
            assert torch.equal(torch.cat(found), batch.input_ids)
    [file] = (tmp_path / "cache").glob("*/train.bin")
    assert file.stat().st_blocks * 512 <= 12 * BLOCK
    assert len(http.ranges("train.bin")) > 150


def test_two_loaders_share_a_cache_that_is_too_small_for_them(http: Server, local: Path, tmp_path: Path) -> None:
    """As two ranks do: each has opened the cache itself."""
    folder = remote_corpus(f"{http.url}/web", DataCache(tmp_path / "cache", 12 * BLOCK / 1e9, block_bytes=BLOCK))
    found: dict[int, list[torch.Tensor]] = {}

    def read(rank: int) -> None:
        with TokenLoader(of(folder), LENGTH, 1, rank, 2, seed=3, prefetch=2) as loader:
            found[rank] = [batch.input_ids for batch in islice(loader, 60)]

    readers = [threading.Thread(target=read, args=(rank,)) for rank in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    with TokenLoader(of(local), LENGTH, 2, seed=3) as loader:
        for first, second, batch in zip(found[0], found[1], islice(loader, 60), strict=True):
            assert torch.equal(torch.cat([first, second]), batch.input_ids)
    assert (folder / "train.bin").stat().st_blocks * 512 <= 12 * BLOCK
    assert len(http.ranges("train.bin")) > 60


KILLED = """
import sys
from pathlib import Path
from phi_fast.data import DataCache, remote_corpus
from phi_fast.data.remote.cached_file import CachedFile
url, folder = sys.argv[1:]
cache = DataCache(folder, 20 * 4096 / 1e9, block_bytes=4096)
file = CachedFile(cache, remote_corpus(url, cache) / "train.bin", f"{url}/train.bin")
for block in range(10**6):
    file.read(block * 5 % 48 * 4096, block * 5 % 48 * 4096 + 4096)
    print(block, flush=True)
"""


def test_a_killed_process_leaves_a_cache_that_the_next_one_uses(http: Server, local: Path, tmp_path: Path) -> None:
    reader = start(KILLED, f"{http.url}/web", tmp_path / "cache")
    assert reader.stdout is not None
    next(line for line in reader.stdout if line == "70\n")  # blocks are being removed all the time
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    http.reset()
    cache = DataCache(tmp_path / "cache", 1, block_bytes=BLOCK)
    folder = remote_corpus(f"{http.url}/web", cache)
    file = cached(folder, cache, f"{http.url}/web")
    there = np.flatnonzero(file.index.present)
    assert len(there) > 5 and cache.used_bytes == len(there) * BLOCK
    on_disk = (folder / "train.bin").read_bytes()
    for start_ in there * BLOCK:
        assert on_disk[start_ : start_ + BLOCK] == DATA[start_ : start_ + BLOCK]
    assert file.read(0, len(DATA)) == DATA
    assert not {start // BLOCK for start, _ in http.ranges("train.bin")} & set(there.tolist())


def test_a_damaged_block_is_fetched_again(http: Server, local: Path, tmp_path: Path) -> None:
    """As after a crash of the machine, which loses what was not yet on disk."""
    cache = DataCache(tmp_path / "cache", 1, block_bytes=BLOCK)
    folder = remote_corpus(f"{http.url}/web", cache)
    assert cached(folder, cache, f"{http.url}/web").read(0, len(DATA)) == DATA
    with (folder / "train.bin").open("r+b") as file:
        file.seek(7 * BLOCK + 100)
        file.write(bytes(50))
    http.requests.clear()
    again = cached(folder, cache, f"{http.url}/web")
    assert again.read(0, len(DATA)) == DATA
    assert http.ranges("train.bin") == [(7 * BLOCK, 8 * BLOCK)]


def test_a_process_killed_while_it_removed_blocks(http: Server, local: Path, tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "cache", 1, block_bytes=BLOCK)
    folder = remote_corpus(f"{http.url}/web", cache)
    file = cached(folder, cache, f"{http.url}/web")
    file.read(0, 20 * BLOCK)
    file.index.evicting = True  # what such a process leaves: blocks that do not count, but lie on disk
    file.index.version[5:15] += 1
    cache = DataCache(tmp_path / "cache", 1, block_bytes=BLOCK)
    assert cache.used_bytes == 10 * BLOCK == (folder / "train.bin").stat().st_blocks * 512
    assert cached(folder, cache, f"{http.url}/web").read(0, 20 * BLOCK) == DATA[: 20 * BLOCK]


def test_the_least_recently_used_blocks_of_all_corpora_are_removed(http: Server, local: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "code", IDS[::-1])
    cache = DataCache(tmp_path / "cache", 20 * BLOCK / 1e9, block_bytes=BLOCK)
    web, code = (remote_corpus(f"{http.url}/{name}", cache) for name in ("web", "code"))
    first, second = cached(web, cache, f"{http.url}/web"), cached(code, cache, f"{http.url}/code")
    for block in range(10):
        first.read(block * BLOCK, (block + 1) * BLOCK)
    first.read(0, 5 * BLOCK)  # used again: the blocks 5 ... 9 are now the oldest
    for block in range(13):
        second.read(block * BLOCK, (block + 1) * BLOCK)
    assert cache.used_bytes <= cache.limit_bytes
    assert np.flatnonzero(first.index.present).tolist() == [0, 1, 2, 3, 4, 8, 9]  # some are removed at once
    assert second.index.present[:13].all()


def test_a_file_that_is_not_the_manifests(http: Server, local: Path, tmp_path: Path) -> None:
    """Another file of the same size is found out once all blocks of a checksum are there."""
    other = IDS.copy()
    other[77_000] ^= 1
    (local / "train.bin").write_bytes(other.astype("<u2").tobytes())
    folder = remote_corpus(f"{http.url}/web", DataCache(tmp_path / "cache", 1, block_bytes=BLOCK))
    with (
        TokenLoader(of(folder), LENGTH, 8, seed=3) as loader,
        pytest.raises(CorpusError, match=rf"{http.url}/web/train.bin: bytes 0 to 199999 have sha256 \w+, the manifest"),
    ):
        for _ in range(300):
            next(loader)


def test_a_corpus_that_was_prepared_again_is_read_anew(http: Server, local: Path, tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "cache", 1, block_bytes=BLOCK)
    before = remote_corpus(f"{http.url}/web", cache)
    assert remote_corpus(f"{http.url}/web/", cache) == before
    write_corpus(local, IDS[::-1])
    after = remote_corpus(f"{http.url}/web", cache)
    assert after != before
    assert cached(after, cache, f"{http.url}/web").read(0, len(DATA)) == IDS[::-1].astype("<u2").tobytes()


def test_what_cannot_be_a_remote_corpus(http: Server, local: Path, tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "cache", 1, block_bytes=BLOCK)
    for url, reason in [
        (f"{http.url}/nothing", "nothing/manifest.json cannot be read: .*404.*upload its folder as it is"),
        (str(local), "is not a URL"),
        (f"{http.url}/web?key=1", "has no query"),
    ]:
        with pytest.raises(UsageError, match=reason):
            remote_corpus(url, cache)
    manifest = json.loads((local / "manifest.json").read_text())
    for changes, reason in [
        ({"file": "../../escaped.bin"}, r"'../../escaped.bin', which is no plain name"),
        ({"ends": "/etc/passwd"}, "no plain name"),
        ({"tokens": 50_000}, "web/train.bin has 200000 bytes, and the manifest says 100000: it was changed"),
        ({"tokens": "many"}, "web/manifest.json: splits.train.tokens is 'many'"),
        ({"sha256": []}, "web/manifest.json: train has 0 checksums"),
    ]:
        document = {**manifest, "splits": {"train": {**manifest["splits"]["train"], **changes}}}
        (local / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(UsageError, match=reason) as caught:
            remote_corpus(f"{http.url}/web", cache)
        assert str(cache.directory) not in str(caught.value)
    assert [path.name for path in cache.directory.iterdir() if path.is_dir()] == []
    assert not (tmp_path / "escaped.bin").exists()


def test_a_cache_that_cannot_be_used(
    http: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = remote_corpus(f"{http.url}/web", DataCache(tmp_path / "cache", 10 * BLOCK / 1e9, block_bytes=BLOCK))
    with pytest.raises(UsageError, match=r"is too small for the 5 batches .* give --data-cache-gb 0.000655 or more"):
        TokenLoader(of(folder), LENGTH, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UsageError, match="5 batches that 8 ranks"):
        TokenLoader(of(folder), LENGTH, 1)
    for gigabytes in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="data_cache_gb"):
            DataCache(tmp_path / "cache", gigabytes)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file cannot be written \(File exists\): name another folder with --data-ca"):
        DataCache(tmp_path / "file")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_000))
    write_corpus(tmp_path / "code", IDS)
    with pytest.raises(UsageError, match=r"its disk has 0\.0 GB left"):
        remote_corpus(f"{http.url}/code", DataCache(tmp_path / "other", 1))

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(cache_module, "_punch_hole", refuse)
    with pytest.raises(UsageError, match="its file system cannot remove parts of files"):
        DataCache(tmp_path / "cache", 1)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs fsspec, s3fs: pip install 'phi-fast\[remote\]'"):
        remote_corpus("s3://bucket/web", DataCache(tmp_path / "cache", 1))


def test_urls_in_paths() -> None:
    assert url_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert url_of(Path("https://host:8000/a") / "b") == "https://host:8000/a/b"
    assert url_of("HF://datasets/x/y") == "hf://datasets/x/y"
    assert [url_of(name) for name in ("data/s3", "/s3:/x", "c:/x", "s3:", "file:///x")] == [None] * 5

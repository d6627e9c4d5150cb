"""Faults of a corpus and their error messages, in one table. No fault crashes the process."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from token_files import DELIMITER, draw_tokens, write_corpus

from phi_fast._C import tokens
from phi_fast.data import Component, Mixture, TokenLoader, sequential_rows, store
from phi_fast.data.loader import CorpusError
from phi_fast.errors import UsageError

LENGTH = 64
IDS = draw_tokens(20_000)


def ours(path):
    write_corpus(path, IDS)
    return Component("c", path)


def raw(path):
    path.mkdir()
    IDS.astype("<u2").tofile(path / "t.bin")
    return Component("c", path / "t.bin", dtype="uint16")


def cut(path, bytes_left):
    os.truncate(path, bytes_left)


def overwrite(path, data):
    path.write_bytes(data)


def unreadable(path):
    path.unlink()
    path.mkdir()


# Change to the corpus's files before it is opened -> message when it is opened.
FAULTS = {
    "truncated": (ours, lambda d: cut(d / "train.bin", 1000), "train.bin has 1000 bytes, and 20000 uint16 tokens take"),
    "truncated to a byte": (raw, lambda d: cut(d / "t.bin", 1001), "1001 bytes, not a multiple of uint16's 2"),
    "truncated below a row": (raw, lambda d: cut(d / "t.bin", 128), "has 64 tokens, fewer than one row of sequence_l"),
    "empty": (ours, lambda d: cut(d / "train.bin", 0), "train.bin has 0 bytes, and 20000 uint16 tokens take 40000"),
    "empty, no header": (raw, lambda d: cut(d / "t.bin", 0), "t.bin is empty"),
    "foreign": (raw, lambda d: overwrite(d / "t.bin", b"PAR1" * 999), "is a Parquet file, not tokens"),
    "foreign manifest": (ours, lambda d: overwrite(d / "manifest.json", b'{"format": "x"}'), "another program's file"),
    "manifest cut short": (ours, lambda d: cut(d / "manifest.json", 60), "cannot be read as JSON"),
    "wrong dtype, too narrow": (
        raw,
        lambda d: IDS.astype("<u4").tofile(d / "t.bin"),
        "holds a 0 after every token if read as uint16",
    ),
    "missing": (ours, lambda d: (d / "train.bin").unlink(), "train.bin: No such file or directory"),
    "unreadable": (raw, lambda d: unreadable(d / "t.bin"), "t.bin/manifest.json does not exist"),
    "ends cut short": (ours, lambda d: cut(d / "train.ends", 8), "train.ends has 8 bytes, and 20 document ends take"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_before_opening(tmp_path, fault):
    make, damage, message = FAULTS[fault]
    component = make(tmp_path / "corpus")
    damage(tmp_path / "corpus")
    with pytest.raises((ValueError, OSError)) as caught:
        TokenLoader(Mixture((component,)), LENGTH, 4)
    assert message in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    component = raw(tmp_path / "c")
    component.path.chmod(0)
    with pytest.raises(PermissionError, match=r"t\.bin"):
        TokenLoader(Mixture((component,)), LENGTH, 4)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(ValueError, match=r"pipe\.bin is not a regular file"):
        TokenLoader(Mixture((Component("c", tmp_path / "pipe.bin", dtype="uint16"),)), LENGTH, 4)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_ids_above_the_vocabulary(tmp_path, threads):
    """Refused at once if the manifest records the largest id, otherwise when the row is read."""
    with pytest.raises(
        ValueError, match=f"corpus 'c' .* has token id {DELIMITER}, above the largest the model takes, 999"
    ):
        TokenLoader(Mixture((ours(tmp_path / "a"),)), LENGTH, 4, max_token_id=999)
    component = raw(tmp_path / "b")
    at = 700
    changed = np.full(len(IDS), 5, "<u2")
    changed[at] = 60_000
    changed.tofile(component.path)
    with TokenLoader(Mixture((component,)), LENGTH, 4, max_token_id=999, threads=threads) as loader:
        message = rf"t\.bin: token {at} is id 60000, and the model's vocabulary has 1000 ids"
        with pytest.raises(ValueError, match=message):
            for _ in range(len(IDS) // LENGTH // 4):
                next(loader)
        row = loader.row
        with pytest.raises(ValueError, match=message):  # tries the same rows again, not the next ones
            next(loader)
        assert loader.row == row
    with TokenLoader(Mixture((component,)), LENGTH, 4, max_token_id=60_000, threads=threads) as loader:
        for _ in range(len(IDS) // LENGTH // 4):
            next(loader)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_training_file_is_an_error_for_users(tmp_path, threads):
    """The manifest's largest id is within the range, so the fault shows only when the row is read."""
    component = ours(tmp_path / "c")
    damaged = IDS.astype("<u2")
    damaged[12_345] = 60_000
    damaged.tofile(tmp_path / "c" / "train.bin")
    with (
        TokenLoader(Mixture((component,)), LENGTH, 4, max_token_id=50_294, threads=threads) as loader,
        pytest.raises(UsageError, match=r"train\.bin: token 12345 is id 60000.*copy or prepare it again") as caught,
    ):
        for _ in range(100):
            next(loader)
    assert isinstance(caught.value, CorpusError)


def test_ids_of_a_validation_split(tmp_path):
    """An id above the model's vocabulary or the manifest's largest id never reaches the embedding as an IndexError."""
    write_corpus(tmp_path, IDS, split="validation")
    largest = int(IDS.max())
    assert (
        sum(ids.numel() for ids, _ in sequential_rows(tmp_path, "validation", LENGTH, max_token_id=largest)) == 19_968
    )
    first = int(np.argmax(IDS >= 40_000))
    with pytest.raises(
        CorpusError, match=rf"validation\.bin: token {first} is id {IDS[first]}, and ids up to 39999 were"
    ):
        list(sequential_rows(tmp_path, "validation", LENGTH, batch=3, max_token_id=39_999))
    damaged = IDS.astype("<u2")
    damaged[LENGTH * 7] = largest + 1
    damaged.tofile(tmp_path / "validation.bin")
    message = rf"validation\.bin: token {LENGTH * 7} is id {largest + 1}, and ids up to {largest} were .* is damaged"
    with pytest.raises(CorpusError, match=message):
        list(sequential_rows(tmp_path, "validation", LENGTH))


def touch(path, stamp):
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("make", [ours, raw])
def test_a_file_that_is_touched_is_read_on(tmp_path, make, threads, mode):
    component = make(tmp_path / "c")
    path = tmp_path / "c" / ("train.bin" if make is ours else "t.bin")
    with (
        TokenLoader(Mixture((component,)), LENGTH, 4, threads=threads, mode=mode) as loader,
        TokenLoader(Mixture((component,)), LENGTH, 4, threads=0, mode=mode) as same,
    ):
        expected = [next(same).input_ids for _ in range(30)]
        for i, ids in enumerate(expected):
            if i % 5 == 0:
                touch(path, i + 1)
            assert (next(loader).input_ids == ids).all()
        changed = IDS.astype("<u2")
        changed[-1] = 1
        changed.tofile(path)
        touch(path, 1000)
        for _ in range(2):  # the second call fails as well
            with pytest.raises(CorpusError, match="was changed while in use: its size is the same, its content is not"):
                for _ in range(30):
                    next(loader)
        IDS.astype("<u2").tofile(path)  # restored
        touch(path, 2000)
        next(loader)


def test_of_a_large_file_that_is_touched_blocks_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SAMPLED_BLOCKS", 3)
    monkeypatch.setattr(store, "SAMPLED_BYTES", 2000)
    component = raw(tmp_path / "c")
    with TokenLoader(Mixture((component,)), LENGTH, 4) as loader:
        for at, seen in [(500, True), (9_500, True), (19_500, True), (5_000, False)]:  # blocks 0, 9 and 19 of 0…19
            changed = IDS.astype("<u2")
            changed[at] ^= 1
            changed.tofile(component.path)
            touch(component.path, at)
            if seen:
                with pytest.raises(CorpusError, match="its content is not"):
                    loader.store.recheck()
            else:
                assert loader.store.recheck()


def rewrite(path):
    with path.open("r+b") as file:
        file.write(b"\1\0")
    os.utime(path, ns=(1, 1))


CHANGES = {
    "cut short": (lambda path: cut(path, 100), "was changed while in use: it has 100 bytes, it had 40000"),
    "emptied": (lambda path: cut(path, 0), "was changed while in use: it has 0 bytes"),
    "appended to": (lambda path: os.truncate(path, 50_000), "it has 50000 bytes, it had 40000"),
    "written to": (rewrite, "was changed while in use"),
}


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_while_training(tmp_path, change, threads, mode):
    do, message = CHANGES[change]
    component = ours(tmp_path / "c")
    with TokenLoader(Mixture((component,)), LENGTH, 4, threads=threads, prefetch=2, mode=mode) as loader:
        for _ in range(10):
            next(loader)
        do(tmp_path / "c" / "train.bin")
        with pytest.raises(RuntimeError, match=message):
            for _ in range(10):
                next(loader)


@pytest.mark.parametrize("mode", ["mmap", "pread"])
def test_replaced_while_training(tmp_path, mode):
    """A file that is replaced by another, as by `prepare`, remains readable for a process that has it open."""
    component = ours(tmp_path / "c")
    with (
        TokenLoader(Mixture((component,)), LENGTH, 4, mode=mode) as loader,
        TokenLoader(Mixture((component,)), LENGTH, 4) as same,
    ):
        expected = [next(same).input_ids for _ in range(60)]
        (tmp_path / "other").write_bytes(bytes(10))
        (tmp_path / "other").replace(tmp_path / "c" / "train.bin")
        assert all((next(loader).input_ids == ids).all() for ids in expected)


def test_cut_short_between_the_check_and_the_copy(tmp_path):
    """The copy from a mapped file is guarded too: the file shrinks and grows continually here."""
    path = tmp_path / "t.bin"
    ids = np.zeros(1_000_000, "<u2")
    ids.tofile(path)
    stop = threading.Event()

    def shake():
        while not stop.is_set():
            os.truncate(path, 10_000)
            os.truncate(path, 2_000_000)

    file = tokens.TokenFile(str(path), 2, 0, len(ids), True)
    shaker = threading.Thread(target=shake)
    shaker.start()
    out, cut_short = np.empty(500_000, "<u2"), 0
    deadline = time.monotonic() + 60
    while not cut_short and time.monotonic() < deadline:  # on a loaded machine the two may not overlap at first
        try:
            file.read(400_000, len(out), out)
        except RuntimeError as error:
            assert "it was cut short while in use" in str(error)
            cut_short += 1
    stop.set()
    shaker.join()
    assert cut_short > 0


def test_reads_beyond_the_end_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    IDS.astype("<u2").tofile(path)
    out = np.empty(10, "<u2")
    for mapped in (True, False):
        file = tokens.TokenFile(str(path), 2, 0, 20_000, mapped)
        for first, count in [(20_000, 1), (19_995, 6), (2**63, 1), (2**64 - 5, 10), (0, 2**63)]:
            with pytest.raises(IndexError, match="has 20000 tokens; asked for"):
                file.read(first, count, out)
        file.read(19_995, 5, out)
        assert out[:5].tolist() == IDS[-5:].tolist()
    for offset, count in [(0, 20_001), (40_001, 0), (2**63, 1), (39_999, 1), (2, 2**64 - 1)]:
        with pytest.raises(RuntimeError, match="has 40000 bytes, too few"):
            tokens.TokenFile(str(path), 2, offset, count, True)
    with pytest.raises(FileNotFoundError, match="none"):
        tokens.TokenFile(str(tmp_path / "none"), 2, 0, 0, True)
    with pytest.raises(RuntimeError, match="is not a regular file"):
        tokens.TokenFile(str(tmp_path), 2, 0, 0, True)

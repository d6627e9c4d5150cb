"""A loader and what lies below it, used from several threads at once: each call is carried out alone, or refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from token_files import draw_tokens, write_corpus

from phi_fast._C import tokens
from phi_fast.data import Component, Mixture, TokenLoader

IDS = draw_tokens(20_000)
LENGTH, BATCH, THREADS, CALLS = 64, 4, 8, 200


def open_loader(path: Path, threads: int) -> TokenLoader:
    mixture = Mixture((Component("c", write_corpus(path / "c", IDS)),))
    return TokenLoader(mixture, LENGTH, BATCH, threads=threads, prefetch=3)


def together(work: Callable[[int], None], count: int = THREADS) -> list[Exception]:
    """Run `work(i)` in `count` threads. Returns what they raised."""
    errors: list[Exception] = []

    def run(i: int) -> None:
        try:
            work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "two threads wait for each other"
    return errors


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_share_the_stream(tmp_path: Path, threads: int) -> None:
    """Every batch goes to one of them, with the tokens that its rows have in the file."""
    batches = []
    with open_loader(tmp_path, threads) as loader:
        assert not together(lambda _: batches.extend(next(loader) for _ in range(CALLS)))
        assert loader.row == THREADS * CALLS * BATCH
        for batch in batches[::7]:
            for i, row in enumerate(batch.rows):
                token = loader.store.place(row).token
                assert batch.input_ids[i].tolist() == IDS[token : token + LENGTH].tolist()
    assert sorted(batch.rows.start for batch in batches) == list(range(0, THREADS * CALLS * BATCH, BATCH))


@pytest.mark.parametrize("threads", [0, 2])
def test_seek_state_and_close_while_others_read(tmp_path: Path, threads: int) -> None:
    loader = open_loader(tmp_path, threads)
    expected = {row: next(loader).input_ids.clone() for row in range(0, 40 * BATCH, BATCH)}
    wrong = []

    def use(i: int) -> None:
        for call in range(CALLS):
            if i == 0:
                loader.seek(call % 10 * BATCH)
            elif i == 1:
                loader.load_state_dict({**loader.state_dict(), "row": call % 20 * BATCH})
            else:
                batch = next(loader)
                known = expected.get(batch.rows.start)
                if known is not None and not torch.equal(batch.input_ids, known):
                    wrong.append(batch.rows)

    assert not together(use)
    assert not wrong

    def close(i: int) -> None:
        if i < 2:
            time.sleep(0.05)
            loader.close()
        else:
            while True:
                next(loader)

    errors = together(close)
    assert len(errors) == THREADS - 2
    assert {str(error) for error in errors} == {"the loader is closed; make a new one"}


def test_a_signal_may_ask_for_the_state(tmp_path: Path) -> None:
    """Its handler runs inside the call that it interrupts, which holds the loader."""
    states = []
    with open_loader(tmp_path, 1) as loader:
        previous = signal.signal(signal.SIGALRM, lambda *_: states.append(loader.state_dict()["row"]))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            while len(states) < 20:
                next(loader)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def test_a_fork_while_a_thread_reads(tmp_path: Path) -> None:
    with open_loader(tmp_path, 2) as loader:
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                next(loader)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(5):
                child = os.fork()
                if not child:
                    signal.alarm(20)  # a deadlock ends it
                    row = loader.row
                    os._exit(0 if next(loader).rows.start == row else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            reader.join()


@pytest.mark.parametrize("threads", [0, 2])
def test_the_prefetcher_itself(tmp_path: Path, threads: int) -> None:
    """Below the loader's lock: submit, take and close from any thread give a batch or an error."""
    IDS.astype("<u2").tofile(tmp_path / "t.bin")
    file = tokens.TokenFile(str(tmp_path / "t.bin"), 2, 0, len(IDS), False)
    order = tokens.Order(corpora=[(1, len(IDS))], stages=[(0, [1])], sequence_length=LENGTH, seed=0)
    reader = tokens.Reader([file], order, 2**31, [-1])
    for _ in range(20):
        prefetcher = tokens.Prefetcher(reader, threads, BATCH, 1)
        memory = [np.empty((THREADS, BATCH, LENGTH), np.int64) for _ in range(2)] + [
            np.empty((THREADS, BATCH), np.int32)
        ]

        def use(i: int, prefetcher: tokens.Prefetcher = prefetcher, memory: list[np.ndarray] = memory) -> None:
            if i == 0:
                time.sleep(0.002)
            for call in range(50):
                if i == 0:
                    prefetcher.close()
                prefetcher.submit(call, BATCH, *(array[i] for array in memory))
                prefetcher.take()

        messages = {str(error) for error in together(use)}
        assert messages <= {
            "the loader is closed",
            "no batch was submitted",
            "another thread is taking a batch: let one thread do it at a time",
        }

"""A loader and the layers below it, used from several threads: each call runs alone, or is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
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


def batch_memory() -> list[np.ndarray]:
    return [*(np.empty((BATCH, LENGTH), np.int64) for _ in range(2)), np.empty(BATCH, np.int32)]


def together(work: Callable[[int], None], count: int = THREADS) -> list[Exception]:
    """Run `work(i)` in `count` threads. Returns the exceptions."""
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
    """Every batch goes to exactly one thread, with its rows' tokens from the file."""
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
    """The handler runs inside the interrupted call, which holds the loader's lock."""
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


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("call", ["next", "seek", "load_state_dict", "close"])
def test_a_signal_may_not_move_the_stream_that_it_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, threads: int
) -> None:
    """The interrupted call may hold the batch that the handler's call would take. It continues undisturbed."""
    refused = []
    calls: dict[str, Callable[[TokenLoader], object]] = {
        "next": next,
        "seek": lambda loader: loader.seek(0),
        "load_state_dict": lambda loader: loader.load_state_dict(loader.state_dict() | {"row": 0}),
        "close": TokenLoader.close,
    }
    with open_loader(tmp_path, threads) as loader:

        def handler(*_: object) -> None:
            with pytest.raises(RuntimeError, match="let the handler set a flag") as error:
                calls[call](loader)
            refused.append(error)

        def interrupted(method: Callable[..., object]) -> Callable[..., object]:
            return lambda *arguments: (signal.raise_signal(signal.SIGALRM), method(*arguments))[1]

        monkeypatch.setattr(loader._ring, "take", interrupted(loader._ring.take))
        monkeypatch.setattr(loader._ring, "lend", interrupted(loader._ring.lend))
        previous = signal.signal(signal.SIGALRM, handler)
        try:
            batches = [next(loader) for _ in range(10)]
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert len(refused) == 3 + 2 * 10  # three batches are prefetched, then one with each returned batch
        for i, batch in enumerate(batches):
            token = loader.store.place(i * BATCH).token
            assert batch.rows.start == i * BATCH
            assert batch.input_ids[0].tolist() == IDS[token : token + LENGTH].tolist()


def at_exit(tmp_path: Path, threads: int, body: str) -> tuple[int, str]:
    """Exit status and standard error of a process whose four daemon threads repeat `use()` until it ends."""
    program = f"""
        import atexit, sys, threading, time
        atexit.register(time.sleep, 0.1)  # after the loaders are closed
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_loader_threads import *
        path, workers = Path({str(tmp_path)!r}), {threads}
        {textwrap.indent(textwrap.dedent(body), " " * 8).strip()}
        def repeat():
            while True:
                try:
                    use()
                except RuntimeError as error:
                    assert str(error) == "the loader is closed; make a new one"
        for _ in range(4):
            threading.Thread(target=repeat, daemon=True).start()
        time.sleep(0.2)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("threads", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)), 3])
def test_daemon_threads_that_read_while_python_ends(tmp_path: Path, threads: int) -> None:
    """Every later call says that the loader is closed. The process ends with its own exit status."""
    body = """
        loader = open_loader(path, workers)
        def use():
            next(loader)
    """
    assert at_exit(tmp_path, threads, body) == (0, "")


@pytest.mark.parametrize("threads", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_daemon_threads_in_a_prefetcher_while_python_ends(tmp_path: Path, threads: int) -> None:
    """Nothing closes the loader: its threads stop waiting for Python's lock, which does not abort the process."""
    body = """
        IDS.astype("<u2").tofile(path / "t.bin")
        file = tokens.TokenFile(str(path / "t.bin"), 2, 0, len(IDS), False)
        order = tokens.Order(corpora=[(1, len(IDS))], stages=[(0, [1])], sequence_length=LENGTH, seed=0)
        reader = tokens.Reader([file], order, 2**31, [-1])
        def use():
            prefetcher, memory = tokens.Prefetcher(reader, workers, BATCH, 1), batch_memory()
            while True:
                prefetcher.submit(0, BATCH, *memory)
                prefetcher.take()
    """
    assert at_exit(tmp_path, threads, body) == (0, "")


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_an_order_and_a_reader_of_many_threads(tmp_path: Path, mapped: bool) -> None:
    IDS.astype("<u2").tofile(tmp_path / "t.bin")
    file = tokens.TokenFile(str(tmp_path / "t.bin"), 2, 0, len(IDS), mapped)
    order = tokens.Order(corpora=[(1, len(IDS))], stages=[(0, [1])], sequence_length=LENGTH, seed=0)
    reader, places = tokens.Reader([file], order, 2**31, [-1]), [order.at(row) for row in range(50)]

    def use(i: int) -> None:
        out, memory = np.empty(LENGTH, "<u2"), batch_memory()
        prefetcher = tokens.Prefetcher(reader, i % 3, BATCH, 1)
        for row in range(50):
            file.accept(file.change_stamp())
            file.check_unchanged()
            assert order.at(row) == places[row]
            first = places[row][4]
            file.read(first, LENGTH, out)
            prefetcher.submit(row, BATCH, *memory)
            prefetcher.take()
            assert out.tolist() == memory[0][0].tolist() == IDS[first : first + LENGTH].tolist()

    assert together(use) == []


def test_a_prefetcher_that_nobody_but_a_waiting_thread_holds(tmp_path: Path) -> None:
    """The last reference is dropped by the waiting call, which then joins the loader's threads."""
    IDS.astype("<u2").tofile(tmp_path / "t.bin")
    file = tokens.TokenFile(str(tmp_path / "t.bin"), 2, 0, len(IDS), False)
    order = tokens.Order(corpora=[(1, len(IDS))], stages=[(0, [1])], sequence_length=LENGTH, seed=0)
    memory = batch_memory()
    for _ in range(20):
        held = [tokens.Prefetcher(tokens.Reader([file], order, 2**31, [-1]), 2, BATCH, 1)]
        for row in range(3):
            held[0].submit(row, BATCH, *memory)
        takers = [threading.Thread(target=held[0].take), threading.Thread(target=held.clear)]
        for thread in takers:
            thread.start()
        for thread in takers:
            thread.join(60)
            assert not thread.is_alive()


@contextlib.contextmanager
def reading(loader: TokenLoader) -> Iterator[None]:
    """Reads batches in another thread meanwhile."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            next(loader)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def test_threads_of_a_forked_child_share_its_stream(tmp_path: Path) -> None:
    """The fork handler makes a new lock, before threads of the child could each make one."""
    with open_loader(tmp_path, 2) as loader, reading(loader):
        next(loader)
        child = os.fork()
        if not child:
            signal.alarm(60)
            row, rows = loader.row, []
            errors = together(lambda _: rows.extend(next(loader).rows.start for _ in range(20)))
            expected = list(range(row, row + THREADS * 20 * BATCH, BATCH))
            os._exit(0 if not errors and sorted(rows) == expected else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_fork_while_a_thread_reads(tmp_path: Path) -> None:
    with open_loader(tmp_path, 2) as loader, reading(loader):
        for _ in range(5):
            child = os.fork()
            if not child:
                signal.alarm(20)  # a deadlock ends it
                row = loader.row
                os._exit(0 if next(loader).rows.start == row else 1)
            assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_the_prefetcher_itself(tmp_path: Path, threads: int) -> None:
    """Without the loader's lock: submit, take and close from any thread give a batch or an error."""
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

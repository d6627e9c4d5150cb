"""Batches of 8 × 2048 tokens from one token file, read by this project's loader and by other common ones.

Loaders are timed batch by batch, in turn, with the file in the page cache and without. Tokens/s per core uses the CPU
time of all threads, including what they read ahead after a turn. The percentiles are of the wall time that a training
loop would wait for each batch.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.harness import Results
from benchmarks.peers import peer
from benchmarks.subjects import Row, Subject
from phi_fast import Phi, PhiConfig
from phi_fast.data import Mixture, TokenLoader

BATCH, LENGTH = 8, 2048
Make = Callable[[Path], tuple[Callable[[], object], Callable[[], None]]]
"""Makes a contender from the file: a call that returns the next (input_ids, labels), and a call that closes it."""


def memcpy_bound(path: Path):
    """The least that any loader must do: write two int64 tensors, here copied from the same memory each time."""
    source, out = np.zeros((2, BATCH, LENGTH), np.int64), np.empty((2, BATCH, LENGTH), np.int64)
    return lambda: np.copyto(out, source), lambda: None


def nanogpt(path: Path):
    """nanoGPT's get_batch, which maps the file anew for each batch and starts rows anywhere."""

    def next_batch():
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,)).tolist()
        rows = [torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in starts]
        next_rows = [torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts]
        return torch.stack(rows), torch.stack(next_rows)

    return next_batch, lambda: None


def numpy_gather(path: Path):
    """NumPy's advanced indexing, once for the whole batch."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    generator, offsets = np.random.default_rng(0), np.arange(LENGTH + 1)

    def next_batch():
        starts = generator.integers(0, len(data) - LENGTH - 1, BATCH)
        rows = torch.from_numpy(data[starts[:, None] + offsets].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    return next_batch, lambda: None


def grain(path: Path):
    """Grain's shuffled MapDataset over the rows, batched, with its default threads and buffers."""
    import grain as grain_

    class Rows:
        def __init__(self):
            self.data = np.memmap(path, dtype=np.uint16, mode="r")

        def __len__(self):
            return (len(self.data) - 1) // LENGTH

        def __getitem__(self, row):
            tokens = self.data[row * LENGTH : row * LENGTH + LENGTH + 1].astype(np.int64)
            return tokens[:-1], tokens[1:]

    dataset = grain_.MapDataset.source(Rows()).shuffle(seed=0).repeat().batch(BATCH)
    batches = iter(dataset.to_iter_dataset())
    return (lambda: tuple(torch.from_numpy(part) for part in next(batches))), lambda: None


def megatron(path: Path):
    """Megatron's GPTDataset without worker processes; rows are read one by one in its sampler's order, and stacked."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexWriter
    from megatron.core.datasets.utils import Split

    prefix, document = str(path.with_suffix("")), 1024
    count = path.stat().st_size // (2 * document)
    if not path.with_suffix(".idx").exists():
        with _IndexWriter(f"{prefix}.idx", np.uint16) as writer:
            writer.write([document] * count, None, list(range(count + 1)))
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=f"{prefix}-indices",
        tokenizer=SimpleNamespace(vocab_size=50257, eod=50256, pad=-1, unique_identifiers={"name": "random"}),
    )
    indexed, documents = IndexedDataset(prefix), np.arange(count, dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
    position = 0

    def next_batch():
        nonlocal position
        rows = [dataset[(position + i) % len(dataset)] for i in range(BATCH)]
        position += BATCH
        return tuple(torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))

    return next_batch, lambda: None


def ours(mode: str) -> Make:
    def make(path: Path):
        loader = TokenLoader(Mixture.of({"c": (path, 1)}, dtype="uint16"), LENGTH, BATCH, mode=mode, threads=1)
        return lambda: next(loader), loader.close

    return make


def contenders() -> dict[str, Make | str]:
    return {
        "memcpy of the output alone": memcpy_bound,
        "nanoGPT get_batch": nanogpt,
        "numpy gather": numpy_gather,
        "Megatron GPTDataset": peer("megatron", lambda: megatron),
        "Grain": peer("grain", lambda: grain),
        "phi_fast": ours("auto"),
        "phi_fast, mapped": ours("mmap"),
    }


@dataclass
class Times:
    """Times of one contender."""

    rounds: list[float] = field(default_factory=list)
    """Wall seconds per batch, as the mean of each round."""
    batches: list[float] = field(default_factory=list)
    """Wall seconds of each batch."""
    cpu: float = 0.0
    """CPU seconds of all threads."""

    def run(self, next_batch: Callable[[], object], count: int) -> None:
        cpu, marks = time.process_time(), [time.perf_counter()]
        for _ in range(count):
            next_batch()
            marks.append(time.perf_counter())
        settle()
        self.cpu += time.process_time() - cpu
        self.batches += np.diff(marks).tolist()
        self.rounds.append((marks[-1] - marks[0]) / count)

    def row(self, name: str) -> Row:
        percentiles = {f"p{q} µs": round(1e6 * float(np.percentile(self.batches, q)), 1) for q in (50, 99, 99.9)}
        rate = len(self.batches) * BATCH * LENGTH / max(self.cpu, 1e-9)
        return Row(name, self.rounds, extra=percentiles | {"M tokens/s per core": round(rate / 1e6, 1)})


def settle() -> None:
    """Wait until no thread works, so that a contender's reading ahead does not fall into the next one's turn."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.03)
        if time.process_time() - before < 0.002:
            return


def forget(path: Path) -> None:
    """Drop the file's pages from the page cache, except those that a process maps."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory, full: bool) -> Path:
    """Random uint16 tokens, on disk."""
    path = tmp_path_factory.mktemp("loader") / "tokens.bin"
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(1024 if full else 2):
            generator.integers(0, 50257, 2**19).astype("<u2").tofile(file)
        os.fsync(file.fileno())
    return path


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_batches(token_file: Path, cache: str, full: bool, results: Results) -> None:
    rounds, count = (5, 500 if cache == "warm" else 100) if full else (1, 3)
    makers = contenders()
    times = {name: Times() for name, make in makers.items() if not isinstance(make, str)}
    open_ = {}
    for round_ in range(rounds):
        for name, make in makers.items():
            if isinstance(make, str):
                continue
            if cache == "cold":
                for _, close in open_.values():
                    close()
                open_.clear()
                gc.collect()  # mapped pages would stay in memory
                forget(token_file)
            elif round_ == 0:
                np.fromfile(token_file, np.uint8)
            if name not in open_:
                open_[name] = make(token_file)
            if cache == "warm" and round_ == 0:
                Times().run(open_[name][0], count)  # threads started, first pages mapped
            times[name].run(open_[name][0], count)
    for _, close in open_.values():
        close()
    rows = [Row(n, None, note=m) if isinstance(m, str) else times[n].row(n) for n, m in makers.items()]
    config = {"batch": BATCH, "sequence": LENGTH, "file_mb": token_file.stat().st_size >> 20, "batches": rounds * count}
    subject = Subject(f"token loader, {cache} page cache", config, rows)
    results.add(subject)
    if full and cache == "warm":
        rates = {row.name: row.extra["M tokens/s per core"] for row in rows if row.seconds}
        peers = max(rates[name] for name in rates if name.startswith(("nanoGPT", "numpy", "Grain", "Megatron")))
        assert rates["phi_fast"] > peers


def test_share_of_a_training_step(tmp_path: Path, full: bool, results: Results) -> None:
    """The share of a step (forward and backward of phi-tiny) that is spent waiting for `next(loader)`."""
    torch.manual_seed(0)
    config = PhiConfig.preset("phi-tiny")
    batch_size, length = (8, 256) if full else (2, 32)
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, config.vocab_size, 2**20).astype("<u2").tofile(path)
    model, steps, waits = Phi(config), [], []
    with TokenLoader(Mixture.of({"c": (path, 1)}, dtype="uint16"), length, batch_size) as loader:
        for _ in range(12 if full else 3):
            start = time.perf_counter()
            batch = next(loader)
            waits.append(time.perf_counter() - start)
            model(batch.input_ids, batch.labels).loss.backward()
            model.zero_grad()
            steps.append(time.perf_counter() - start)
    share = sum(waits[1:]) / sum(steps[1:])
    extra = {"waiting for data": f"{100 * share:.3f}%", "longest wait µs": round(1e6 * max(waits[1:]), 1)}
    row = Row("phi-tiny, forward and backward", steps[1:], extra=extra)
    results.add(Subject("stall share of a training step", {"batch": batch_size, "sequence": length}, [row]))
    if full:
        assert share < 0.01

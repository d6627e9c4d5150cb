"""TokenLoader: the same stream for every world size, thread count and mode; resuming; reused memory; forks, exits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import DELIMITER, draw_tokens, write_corpus

from phi_fast.data import Mixture, TokenLoader, documents

LENGTH = 32
IDS = {"docs": draw_tokens(9000, 1), "code": draw_tokens(2500, 2), "web": draw_tokens(33, 3, documents=2)}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    dtypes = {"docs": "uint16", "code": "uint32", "web": "uint16"}
    paths = {name: write_corpus(folder / name, ids, dtypes[name]) for name, ids in IDS.items()}
    return Mixture.of(
        {"docs": (paths["docs"], 7), "code": (paths["code"], 3), "web": (paths["web"], 1)},
        stages=[(500, {"docs": 1, "code": 1})],
    )


def take(loader, count):
    """(rows, input_ids, labels, components) of the next `count` batches, concatenated."""
    batches = [next(loader) for _ in range(count)]
    parts = ("input_ids", "labels", "components")
    return [[row for b in batches for row in b.rows], *(torch.cat([getattr(b, p) for b in batches]) for p in parts)]


def digest(parts):
    state = hashlib.sha256(json.dumps(parts[0]).encode())
    for part in parts[1:]:
        state.update(part.numpy().tobytes())
    return state.hexdigest()


def test_rows_are_those_of_the_files(mixture):
    with TokenLoader(mixture, LENGTH, 16, seed=5) as loader:
        rows, input_ids, labels, components = take(loader, 40)
        assert rows == list(range(640))
        assert (input_ids.dtype, labels.dtype, input_ids.shape) == (torch.int64, torch.int64, (640, LENGTH))
        for row in rows:
            place = loader.store.place(row)
            assert mixture.components[components[row]].name == place.corpus
            tokens = IDS[place.corpus][place.token : place.token + LENGTH + 1]
            assert input_ids[row].tolist() == tokens[:-1].tolist()
            assert labels[row].tolist() == tokens[1:].tolist()


@pytest.fixture(scope="module")
def one_stream(mixture):
    with TokenLoader(mixture, LENGTH, 24, seed=5, threads=0) as loader:
        return digest(take(loader, 30))


@pytest.mark.parametrize("mode", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("threads", range(9))
def test_threads_do_not_change_the_stream(mixture, one_stream, threads, mode):
    with TokenLoader(mixture, LENGTH, 24, seed=5, threads=threads, mode=mode, prefetch=1 + threads) as loader:
        assert digest(take(loader, 30)) == one_stream


@pytest.mark.parametrize(
    ("world_size", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 4), (8, 1), (8, 3)]
)
def test_ranks_and_micro_batches_do_not_change_the_global_batches(mixture, one_stream, world_size, accumulation):
    """The rows of a global batch, ordered by micro-step, then rank."""
    batch = 24 // (world_size * accumulation)
    loaders = [TokenLoader(mixture, LENGTH, batch, r, world_size, seed=5, threads=1) for r in range(world_size)]
    parts = [take(loader, 1) for _ in range(30 * accumulation) for loader in loaders]
    whole = [[row for part in parts for row in part[0]], *(torch.cat([part[i] for part in parts]) for i in (1, 2, 3))]
    assert digest(whole) == one_stream
    for loader in loaders:
        loader.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
def test_resume_anywhere_gives_what_never_stopping_gives(mixture, stop, batch, threads, prefetch):
    with TokenLoader(mixture, LENGTH, batch, seed=1, threads=threads, prefetch=prefetch) as loader:
        for _ in range(stop):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["row"] == stop * batch
        expected = digest(take(loader, 4))
    with TokenLoader(mixture, LENGTH, batch, seed=1, threads=1) as other:
        take(other, 2)  # batches prefetched before the seek must not come back
        other.load_state_dict(state)
        assert digest(take(other, 4)) == expected


def test_seek(mixture):
    with TokenLoader(mixture, LENGTH, 4, 1, 2) as loader:
        for row in (10**15, 3, 0):
            loader.seek(row)
            assert list(next(loader).rows) == list(range(row + 4, row + 8))
            assert loader.row == row + 8
        with pytest.raises(ValueError, match="row=-1: must be in 0"):
            loader.seek(-1)


def test_resume_on_another_number_of_ranks(mixture):
    with TokenLoader(mixture, LENGTH, 6, 0, 2) as first:
        take(first, 5)
        state = first.state_dict()
    with TokenLoader(mixture, LENGTH, 12) as whole:
        whole.load_state_dict(state)
        assert list(next(whole).rows) == list(range(60, 72))


def test_states_of_other_streams_are_refused(mixture, tmp_path):
    state = TokenLoader(mixture, LENGTH, 4).state_dict()
    changed = IDS["code"].copy()
    changed[7] += 1
    components = {c.name: (c.path, c.weight) for c in mixture.components}
    other = Mixture.of(components | {"code": (write_corpus(tmp_path / "code", changed, "uint32"), 3)})
    with pytest.raises(ValueError, match=r"corpus 'code' at .* has fingerprint .* it is not the same data"):
        TokenLoader(other, LENGTH, 4).load_state_dict(state)
    fewer = Mixture.of({name: components[name] for name in ("docs", "code")})
    with pytest.raises(ValueError, match="corpus 'web' has fingerprint None"):
        TokenLoader(fewer, LENGTH, 4).load_state_dict(state)
    weights = Mixture.of(components | {"code": (components["code"][0], 4)})
    with pytest.raises(ValueError, match=r"mixture is .* the data order would change"):
        TokenLoader(weights, LENGTH, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 1 here and 0 in the checkpoint"):
        TokenLoader(mixture, LENGTH, 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="sequence_length is 16 here and 32 in the checkpoint"):
        TokenLoader(mixture, 16, 4).load_state_dict(state)


def test_moved_corpora_resume(mixture, tmp_path):
    components = {c.name: (c.path, c.weight) for c in mixture.components}
    moved = {
        name: (write_corpus(tmp_path / name, IDS[name], "uint32" if name == "code" else "uint16"), weight)
        for name, (_, weight) in components.items()
    }
    stages = [(stage.start_row, stage.weights) for stage in mixture.stages]
    TokenLoader(Mixture.of(moved, stages=stages), LENGTH, 4).load_state_dict(
        TokenLoader(mixture, LENGTH, 4).state_dict()
    )


def test_isolation_is_the_oracles(tmp_path):
    ids = draw_tokens(4000, 9, documents=150)
    ids[1000:1003] = DELIMITER  # empty documents
    mixture = Mixture.of({"c": (write_corpus(tmp_path / "c", ids), 1)})
    with TokenLoader(mixture, 100, 6, document_isolation=True) as loader:
        for _ in range(10):
            batch = next(loader)
            starts, positions = [], []
            for i, token in enumerate(batch.input_ids.flatten().tolist()):
                if i % 100 == 0 or token == DELIMITER:
                    starts.append(i)
                positions.append(i - starts[-1])
            assert batch.cu_seqlens.tolist() == [*starts, 600]
            assert batch.cu_seqlens.dtype == torch.int32
            assert torch.equal(documents(batch.input_ids, DELIMITER), batch.cu_seqlens)
            assert batch.positions.flatten().tolist() == positions
    with TokenLoader(mixture, 100, 6) as loader:
        assert next(loader).positions is None


def test_a_batch_keeps_its_memory_while_anything_views_it(mixture):
    with TokenLoader(mixture, LENGTH, 4, seed=2, prefetch=2) as loader:
        held = [next(loader).labels[1:, 3:] for _ in range(30)]  # only views, and more batches than the ring has
        copies = [view.clone() for view in held]
        take(loader, 30)
        assert all(torch.equal(view, copy) for view, copy in zip(held, copies, strict=True))
        loader.seek(0)
        assert all(torch.equal(next(loader).labels[1:, 3:], view) for view in held)
    assert all(torch.equal(view, copy) for view, copy in zip(held, copies, strict=True))


def test_memory_is_used_again(mixture):
    with TokenLoader(mixture, LENGTH, 4, prefetch=2) as loader:
        addresses = set()
        for _ in range(200):
            addresses.add(next(loader).input_ids.data_ptr())
        assert len(addresses) <= 4


def test_batches_outlive_a_loader_that_is_let_go_of(mixture):
    loader = TokenLoader(mixture, LENGTH, 4)
    batch, gone = next(loader), weakref.ref(loader)
    expected = batch.input_ids.clone()
    del loader
    assert gone() is None
    assert torch.equal(batch.input_ids, expected)


def test_closing_stops_the_threads(mixture):
    def threads():
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    loader = TokenLoader(mixture, LENGTH, 4, threads=3)
    next(loader)
    assert threads() == before + 3
    loader.close()
    loader.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_reads_on_by_itself(mixture):
    loader = TokenLoader(mixture, LENGTH, 4, threads=2)
    next(loader)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as out:
            out.write(digest(take(loader, 5)))
        loader.close()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    assert found == digest(take(loader, 5))
    loader.close()


class Stream(torch.utils.data.IterableDataset):
    """Wraps the loader for torch's DataLoader, as a user would."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for _ in range(4):
            batch = next(self.loader)
            yield batch.rows.start, batch.input_ids.clone()


@pytest.mark.parametrize("workers", [0, 1])
def test_inside_torchs_data_loader(mixture, workers):
    with TokenLoader(mixture, LENGTH, 4) as loader:
        next(loader)
        rows = [(row, ids.sum()) for row, ids in torch.utils.data.DataLoader(Stream(loader), None, num_workers=workers)]
        loader.seek(4)
        assert rows == [(batch.rows.start, batch.input_ids.sum()) for batch in (next(loader) for _ in range(4))]


EXITS = {
    "open iterator": "next(loader)",
    "in a cycle": "next(loader); loader.me = loader",
    "in another thread": "next(loader); threading.Thread(target=lambda: next(loader)).start()",
    "by an exception": "next(loader); raise SystemExit(0)",
    "forked, closed in both": "next(loader); child = os.fork(); loader.close(); child and os.waitpid(child, 0)",
}


@pytest.mark.slow
def test_python_exits_however_the_loader_was_left(mixture):
    """No hang, no crash, no output on stderr. Each way to exit runs in its own process, forked from one with torch."""
    program = f"""
        import os, sys, threading
        from phi_fast.data import Mixture, TokenLoader
        processes = dict()
        for name, code in {list(EXITS.items())!r}:
            processes[name] = os.fork()
            if processes[name] == 0:
                loader = TokenLoader(Mixture.of({{"c": ({str(mixture.components[0].path)!r}, 1)}}), 32, 4, threads=4)
                exec(code)
                break
        else:
            for name, process in processes.items():
                print(name, os.waitpid(process, 0)[1], flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == ([f"{name} 0" for name in EXITS], "", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0: must be at least 1"),
        ({"batch": 0}, "batch=0: must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank=2: must be in 0"),
        ({"threads": -1}, "threads=-1: must be at least 0"),
        ({"prefetch": 0}, "prefetch=0: must be at least 1"),
        ({"seed": -1}, r"seed=-1: must be in 0 \.\.\. 2\^64 - 1"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be in 0"),
        ({"mode": "fast"}, "mode='fast': must be 'auto', 'mmap' or 'pread'"),
    ],
)
def test_arguments_that_cannot_be(mixture, changes, message):
    with pytest.raises(ValueError, match=message):
        TokenLoader(mixture, **({"sequence_length": LENGTH, "batch": 4} | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_pinned_memory_needs_cuda(mixture):
    with pytest.raises(ValueError, match="pin_memory=True needs a CUDA device"):
        TokenLoader(mixture, LENGTH, 4, pin_memory=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_batches_survive_copies_in_flight(mixture):
    with TokenLoader(mixture, LENGTH, 4) as loader:
        assert next(loader).input_ids.is_pinned()
        loader.seek(0)
        copies = [next(loader).input_ids.to("cuda", non_blocking=True) for _ in range(100)]
        loader.seek(0)
        assert all(torch.equal(copy.cpu(), next(loader).input_ids) for copy in copies)

"""Every entry point of `phi_fast._C.tokens` refuses invalid memory and numbers. `make sanitize` runs this too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_files import draw_tokens

from phi_fast._C import tokens

IDS = draw_tokens(1000)
LENGTH, ROWS = 16, 3
PARSERS = ("parse_llmc", "parse_npy", "parse_megatron", "parse_datatrove")
CORPORA, STAGES = [(1, len(IDS))], [(0, [1])]


@pytest.fixture
def file(tmp_path: Path) -> tokens.TokenFile:
    IDS.astype("<u2").tofile(tmp_path / "t.bin")
    return tokens.TokenFile(str(tmp_path / "t.bin"), 2, 0, len(IDS), True)


@pytest.fixture
def order() -> tokens.Order:
    return tokens.Order(CORPORA, STAGES, LENGTH, 0)


@pytest.fixture
def prefetcher(file: tokens.TokenFile, order: tokens.Order) -> tokens.Prefetcher:
    return tokens.Prefetcher(tokens.Reader([file], order, 2**31, [-1]), 1, ROWS, 1)


def batch() -> dict[str, Any]:
    """All buffers of a batch."""
    cells = (np.empty((ROWS, LENGTH), np.int64) for _ in range(3))
    names = ("input_ids", "labels", "positions")
    others = {"corpora": np.empty(ROWS, np.int32), "cu_seqlens": np.empty(ROWS * LENGTH + 1, np.int32)}
    return dict(zip(names, cells, strict=True)) | others


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


NOT_BUFFERS: list[Any] = [0, 2**47, None, "text", [1, 2]]
WRONG_MEMORY: dict[str, Callable[[np.ndarray], Any]] = {
    "an item short": lambda a: a.reshape(-1)[:-1],
    "empty": lambda a: a.reshape(-1)[:0],
    "narrow items": lambda a: np.empty(a.shape, np.uint8),
    "wide items": lambda a: np.empty(a.shape, np.complex128),
    "gaps": lambda a: np.empty((a.size, 2), a.dtype)[:, 0],
    "backwards": lambda a: a.reshape(-1)[::-1],
    "one item for all": lambda a: np.broadcast_to(a.reshape(-1)[:1], a.shape),
    "read-only": read_only,
    "columns first": lambda a: np.empty((2, a.size), a.dtype).T,
}


def taken(calls: dict[str, Callable[[], object]]) -> list[str]:
    """The names of the calls that succeed."""
    done = []
    for name, call in calls.items():
        try:
            call()
            done.append(name)
        except (ValueError, TypeError, IndexError, BufferError, RuntimeError) as error:
            assert str(error)
    return done


def test_memory_of_a_batch(prefetcher: tokens.Prefetcher) -> None:
    calls: dict[str, Callable[[], object]] = {}
    for name in batch():
        for what, spoilt in WRONG_MEMORY.items():
            given = batch() | {name: spoilt(batch()[name])}
            calls[f"{name}: {what}"] = lambda given=given: prefetcher.submit(0, ROWS, **given)
        for what in NOT_BUFFERS:
            given = batch() | {name: what}
            calls[f"{name}: {what!r}"] = lambda given=given: prefetcher.submit(0, ROWS, **given)
    for rows in (ROWS + 1, 2**60, 2**64 - 1, -1):
        calls[f"{rows} rows"] = lambda rows=rows: prefetcher.submit(0, rows, **batch())
    assert taken(calls) == []
    good = batch()
    for row in (0, 2**61):
        prefetcher.submit(row, ROWS, **good)
        assert prefetcher.take()[0] >= ROWS
    for row in (2**62 - 1, 2**64 - 1):
        prefetcher.submit(row, ROWS, **good)
        with pytest.raises(ValueError, match="is beyond 2"):
            prefetcher.take()


def test_memory_of_a_read(file: tokens.TokenFile) -> None:
    out = np.empty(20, "<u2")
    calls = {what: lambda spoilt=spoilt: file.read(0, 20, spoilt(out.copy())) for what, spoilt in WRONG_MEMORY.items()}
    calls |= {repr(what): lambda what=what: file.read(0, 1, what) for what in NOT_BUFFERS}
    wrong = [(0, 21), (981, 20), (1000, 1), (2**63, 1), (2**64 - 1, 20), (0, 2**63), (-1, 20), (0, -1)]
    calls |= {str(where): lambda where=where: file.read(*where, out) for where in wrong}
    assert taken(calls) == []
    file.read(980, 20, out)
    assert out.tolist() == IDS[-20:].tolist()


def test_memory_of_a_permutation() -> None:
    out = np.empty(20, np.uint64)
    calls = {
        what: lambda spoilt=spoilt: tokens.permutation(20, 1, spoilt(out.copy()))
        for what, spoilt in WRONG_MEMORY.items()
    }
    calls |= {repr(what): lambda what=what: tokens.permutation(20, 1, what) for what in NOT_BUFFERS}
    calls |= {str(n): lambda n=n: tokens.permutation(n, 1, out) for n in (21, 2**61, 2**64 - 1, -1)}
    assert taken(calls) == []
    tokens.permutation(20, 1, out)
    assert sorted(out) == list(range(20))


@pytest.mark.parametrize("parser", PARSERS)
def test_headers_that_are_no_bytes_in_a_row(parser: str) -> None:
    parse, header = getattr(tokens, parser), bytes(2000)
    wrong = [memoryview(header)[::-1], memoryview(header)[::2], np.zeros(20, "<u8"), np.zeros((4, 4), "u1")]
    calls = {str(i): lambda given=given: parse(given, 100) for i, given in enumerate([*wrong, *NOT_BUFFERS])}
    assert taken(calls) == []
    for given in wrong[:2]:
        with pytest.raises(ValueError, match="side by side"):
            parse(given, 100)


def test_numbers_and_missing_parts(tmp_path: Path, file: tokens.TokenFile, order: tokens.Order) -> None:
    path = str(tmp_path / "t.bin")
    reader = tokens.Reader([file], order, 2**31, [-1])
    made = {
        "no order": lambda: tokens.Reader([file], None, 10, [0]),
        "no file": lambda: tokens.Reader([None], order, 10, [0]),
        "a file short": lambda: tokens.Reader([], order, 10, []),
        "a file too many": lambda: tokens.Reader([file, file], order, 10, [0, 0]),
        "a delimiter short": lambda: tokens.Reader([file], order, 10, []),
        "no reader": lambda: tokens.Prefetcher(None, 1, 1, 1),
        "far ahead": lambda: tokens.Prefetcher(reader, 1, 0, 2**40),
        "width": lambda: tokens.TokenFile(path, 3, 0, 1, True),
        "offset": lambda: tokens.TokenFile(path, 2, 2**64 - 1, 1, True),
        "tokens": lambda: tokens.TokenFile(path, 2, 2, 2**63 - 1, True),
        "a path that ends early": lambda: tokens.TokenFile(path + "\0.bin", 2, 0, 1, True),
        "no weights": lambda: tokens.chairman([]),
        "huge weights": lambda: tokens.chairman([2**63, 2**63]),
    }
    calls: dict[str, Callable[[], object]] = dict(made)
    for row in (2**62, 2**64 - 1, -1):
        calls[f"row {row}"] = lambda row=row: order.at(row)
    for corpus in (1, 2**31, 2**32 - 1, -1):
        calls[f"rows of corpus {corpus}"] = lambda corpus=corpus: order.rows(corpus)
    assert taken(calls) == []
    assert order.rows(0) == len(IDS) // LENGTH - 1


def test_a_file_shorter_than_its_order(file: tokens.TokenFile) -> None:
    """The order gives the place to read; the file checks that it exists."""
    order = tokens.Order([(1, 100_000)], STAGES, LENGTH, 0)
    prefetcher = tokens.Prefetcher(tokens.Reader([file], order, 2**31, [-1]), 0, ROWS, 1)
    given = batch()
    prefetcher.submit(0, ROWS, **given)
    with pytest.raises(IndexError, match="has 1000 tokens; asked for 17"):
        prefetcher.take()


def test_every_entry_is_tried_here() -> None:
    there = {name for name in dir(tokens) if not name.startswith("_")}
    assert there == {"permutation", "chairman", "TokenFile", "Order", "Reader", "Prefetcher", *PARSERS}

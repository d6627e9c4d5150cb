"""Random headers: the parsers refuse them or give a valid layout. `make sanitize` runs this under ASan and UBSan."""

from __future__ import annotations

import os
import struct

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_files import draw_tokens, llmc, megatron_index

from phi_fast._C import tokens

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
IDS = draw_tokens(60, documents=3)
NPY = b"\x93NUMPY\x01\x00"
EXTREMES = [0, 1, 2, 30, 60, 61, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
HUGE = st.sampled_from(EXTREMES)
SIZES = st.one_of(st.integers(0, 2000), HUGE)


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """A valid header with some bytes or 8-byte fields changed, and perhaps its end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if draw(st.booleans()):
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        else:
            data[at : at + 8] = struct.pack("<Q", draw(HUGE))[: len(data[at : at + 8])]
    return bytes(data[: draw(st.sampled_from([len(data), draw(st.integers(0, len(data)))]))])


def npy_headers() -> st.SearchStrategy[bytes]:
    words = [
        "'descr'",
        "'shape'",
        "'fortran_order'",
        ":",
        ",",
        "(",
        ")",
        "'<u2'",
        "'<u4'",
        "60",
        "60,",
        " ",
        "{",
        "}",
        "'",
    ]
    text = st.lists(st.sampled_from([*words, "False", "9" * 30]), max_size=20).map("".join)
    good = "{'descr': '<u2', 'fortran_order': False, 'shape': (60,), }"
    return st.one_of(
        st.builds(lambda body: NPY + struct.pack("<H", len(body)) + body.encode(), text),
        damaged(NPY + struct.pack("<H", len(good)) + good.encode() + IDS.astype("<u2").tobytes()),
    )


def check(parse, header: bytes, file_size: int) -> None:
    """Assert that the header is refused, or that the tokens fill the file from the offset to its end."""
    try:
        width, offset, count, documents = parse(header, file_size)
    except ValueError as error:
        assert str(error)
        return
    assert width in (2, 4)
    assert count > 0
    assert offset + width * count == file_size
    assert documents >= 0


@settings(max_examples=EXAMPLES, deadline=None)
@given(damaged(llmc(IDS, "uint16")), SIZES)
@example(llmc(IDS, "uint16"), 1024 + 120)
def test_llmc(header, size):
    check(tokens.parse_llmc, header, size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(npy_headers(), SIZES)
def test_npy(header, size):
    check(tokens.parse_npy, header, size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(damaged(megatron_index([20, 0, 30, 10], "uint16")), st.one_of(st.just(120), SIZES))
def test_megatron(index, size):
    check(tokens.parse_megatron, index, size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=100), st.sampled_from([8, 17, 26, 34]), HUGE, SIZES)
def test_megatron_with_any_body(body, at, value, size):
    index = bytearray(megatron_index([60], "uint16")[:34] + body)
    index[at : at + 8] = struct.pack("<Q", value)
    check(tokens.parse_megatron, bytes(index), size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(damaged(np.array([10, 20, 60], "<u8").tobytes()), st.one_of(st.sampled_from([120, 240]), SIZES))
def test_datatrove(ends, size):
    check(tokens.parse_datatrove, ends, size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=200), SIZES)
def test_bytes_of_any_kind(data, size):
    for parse in (tokens.parse_llmc, tokens.parse_npy, tokens.parse_megatron, tokens.parse_datatrove):
        check(parse, data, size)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.tuples(HUGE, HUGE), max_size=3), st.lists(st.lists(HUGE, max_size=3), max_size=3), HUGE, HUGE)
def test_orders_of_any_kind(corpora, weights, length, row):
    try:
        order = tokens.Order(corpora, [(i * 10, w) for i, w in enumerate(weights)], length, 1)
        corpus, _, _, _, token = order.at(row)
    except ValueError as error:
        assert str(error)
        return
    assert token + length < corpora[corpus][1]


def test_good_headers_are_read():
    assert tokens.parse_llmc(llmc(IDS, "uint32"), 1024 + 240) == (4, 1024, 60, 0)
    assert tokens.parse_megatron(megatron_index([20, 0, 30, 10], "uint16"), 120) == (2, 0, 60, 4)
    assert tokens.parse_datatrove(np.array([20, 60], "<u8").tobytes(), 240) == (4, 0, 60, 2)

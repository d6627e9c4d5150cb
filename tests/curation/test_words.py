"""Words and their hashes, against Python's own splitting."""

from __future__ import annotations

import re

import numpy as np
import pytest
from curation_files import text
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_fast.curation import words
from phi_fast.curation.words import ngrams, words_of


@given(st.text(alphabet="aB z.,-\n\t_9é—", max_size=60))
@settings(max_examples=150, deadline=None)
def test_words_are_those_of_a_regular_expression(sample: str) -> None:
    expected = re.findall(r"[^\W_]+", sample.lower())
    found = words_of(sample)
    assert [found.run(i, 1).decode() for i in range(len(found.hashes))] == expected
    assert len({*found.hashes.tolist()}) == len({*expected})  # equal exactly for equal words


def test_scripts_without_spaces_are_split_into_characters() -> None:
    assert len(words_of("東京タワー").hashes) == 5 - 1 + 1
    assert len(words_of("東京 is Tokyo").hashes) == 4


def test_long_texts_are_hashed_as_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = text(1, 4000)
    whole = words_of(sample)
    monkeypatch.setattr(words, "_BLOCK", 1000)
    blocks = words_of(sample)
    assert np.array_equal(whole.hashes, blocks.hashes) and np.array_equal(whole.starts, blocks.starts)
    assert blocks.run(3990, 3) == " ".join(sample.split()[3990:3993]).encode()
    assert len(words_of("x" * 2500).hashes) == 3  # a word longer than a block is cut


def test_ngrams_tell_order_and_length() -> None:
    one, other = (ngrams(words_of(sample).hashes, 3) for sample in ("a b c d", "a b c e"))
    assert len(one) == len(other) == 2 and one[0] == other[0] and one[1] != other[1]
    assert ngrams(words_of("b a").hashes, 3).tolist() != ngrams(words_of("a b").hashes, 3).tolist()
    assert len(ngrams(words_of("a b").hashes, 3)) == 1 and len(ngrams(words_of("?!").hashes, 3)) == 0

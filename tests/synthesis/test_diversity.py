"""Similarity and diversity against values worked out by hand, or by exact sets instead of MinHash."""

from __future__ import annotations

import gzip
import random

import pytest

pytest.importorskip("rensa")

from phi_fast.errors import UsageError
from phi_fast.synthesis.diversity import diversity, evenly
from phi_fast.synthesis.duplicates import NearDuplicates, bands, shingles, signature


def mixed(share: float, words: int, seed: int) -> tuple[str, str]:
    """Two texts of which the first `share` is the same."""
    generator = random.Random(seed)
    same = [f"s{generator.randrange(10**6)}" for _ in range(int(words * share))]
    rest = [[f"{side}{generator.randrange(10**6)}" for _ in range(words - len(same))] for side in "ab"]
    first, second = (" ".join([*same, *part]) for part in rest)
    return first, second


def jaccard(first: str, second: str) -> float:
    one, two = (set(zip(*(text.split()[i:] for i in range(5)), strict=False)) for text in (first, second))
    return len(one & two) / len(one | two)


def test_a_shingle_is_five_words() -> None:
    assert shingles("One, two THREE four five six.") == {"one two three four five", "two three four five six"}
    assert shingles("One two") == {"one two"}
    assert shingles(" ... ") == set()


def test_signatures_estimate_the_similarity() -> None:
    """Within four standard errors of the exact similarity of the sets."""
    for share in (0.2, 0.5, 0.8, 0.9):
        first, second = mixed(share, 400, int(share * 10))
        exact = jaccard(first, second)
        error = (exact * (1 - exact) / 128) ** 0.5
        assert abs(signature(first).jaccard(signature(second)) - exact) < 4 * error


def test_near_duplicates_are_found_and_others_are_not() -> None:
    """20 texts of similarity 0.9 are all found at the threshold 0.7, 20 of similarity 0.4 are not."""
    near = NearDuplicates(0.7)
    for i in range(20):
        for share, found in ((0.95, True), (0.57, False)):
            first, second = mixed(share, 300, 100 * i + found)
            assert jaccard(first, second) == pytest.approx(0.9 if found else 0.4, abs=0.03)
            assert near.add(4 * i + 2 * found, first) is None
            assert near.add(4 * i + 2 * found + 1, second) == (4 * i + 2 * found if found else None)


def test_the_most_similar_text_is_named() -> None:
    near = NearDuplicates(0.5)
    words = [f"w{i}" for i in range(300)]
    assert near.add(0, " ".join(words)) is None
    assert near.add(1, " ".join([*words[:150], *(f"x{i}" for i in range(150))])) is None
    assert near.add(2, " ".join([*words[:150], *(f"x{i}" for i in range(140)), *words[:10]])) == 1


@pytest.mark.parametrize("similarity", [0.01, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_the_index_misses_at_most_one_in_a_hundred(similarity: float) -> None:
    count, rows = bands(similarity)
    assert count * rows <= 128
    if similarity > 0.04:
        assert (1 - similarity**rows) ** count <= 0.01
    assert count >= 2
    NearDuplicates(similarity)


@pytest.mark.parametrize("similarity", [0, -0.1, 1.1])
def test_a_similarity_out_of_range(similarity: float) -> None:
    with pytest.raises(UsageError, match="--duplicate-similarity"):
        NearDuplicates(similarity)


def test_diversity_of_texts_by_hand() -> None:
    texts = ["a b c a b c", "A b, d"]
    found = diversity(texts)
    assert (found["texts"], found["words"]) == (2, 9)
    assert found["distinct_1"] == 4 / 9
    assert found["distinct_2"] == 4 / 7  # ab bc ca bd
    assert found["distinct_3"] == 4 / 5  # abc bca cab abd
    assert found["distinct_4"] == 3 / 3  # abca bcab cabc
    packed = gzip.compress(b"a b c a b c\nA b, d\n", mtime=0)
    assert found["compression_ratio"] == pytest.approx(19 / len(packed), rel=0.01)


def test_self_similarity_is_that_of_all_pairs() -> None:
    first, second = mixed(0.8, 400, 3)
    other, _ = mixed(0.8, 400, 4)
    found = diversity([first, second, other])["self_similarity"]
    pair = jaccard(first, second)
    assert found["largest"] == pytest.approx(pair, abs=0.15)
    assert found["mean"] == pytest.approx(pair / 3, abs=0.05)
    assert found["mean_of_nearest"] == pytest.approx(pair * 2 / 3, abs=0.1)
    assert diversity([first, first])["self_similarity"]["mean"] == 1


def test_repetition_lowers_every_measure_of_diversity() -> None:
    rng = random.Random(0)
    varied = [" ".join(str(rng.randrange(5000)) for _ in range(100)) for _ in range(20)]
    same = [varied[i % 3] for i in range(20)]
    one, two = diversity(varied), diversity(same)
    assert all(one[f"distinct_{n}"] > 2 * two[f"distinct_{n}"] for n in (1, 2, 3, 4))
    assert two["compression_ratio"] > 2 * one["compression_ratio"]
    assert two["self_similarity"]["mean_of_nearest"] == 1


def test_too_few_texts_have_no_diversity() -> None:
    assert diversity([]) == {
        "texts": 0, "words": 0, "self_similarity": None, "compression_ratio": None,
        **{f"distinct_{n}": None for n in (1, 2, 3, 4)},
    }  # fmt: skip
    assert diversity(["one"])["self_similarity"] is None


def test_a_sample_is_spread_evenly() -> None:
    assert evenly(3) == [0, 1, 2]
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(0) == []

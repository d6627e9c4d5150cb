"""The order of rows: equal to a slow oracle in Python, a bijection, uniform, with the right shares at every row."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from phi_fast._C import tokens

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & MASK
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ x >> 33


def combine(key: int, value: int) -> int:
    return mix((key ^ mix((value + GOLDEN) & MASK)) + GOLDEN & MASK)


def oracle_permutation(n: int, key: int, i: int) -> int:
    bits = (n - 1).bit_length()
    half = bits // 2
    while True:
        high, low = divmod(i, 2 ** (bits - half))
        for step in range(8):
            round_key = mix((key + (step + 1) * GOLDEN) & MASK)
            if step % 2 == 0:
                high ^= mix((low + round_key) & MASK) % 2**half
            else:
                low ^= mix((high + round_key) & MASK) % 2 ** (bits - half)
        i = high * 2 ** (bits - half) + low
        if i < n:
            return i


def oracle_chairman(weights: list[int]) -> list[int]:
    """Tijdeman's rule, literally, in fractions."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    positive = [i for i, share in enumerate(shares) if share]
    if len(positive) == 1:
        return positive * sum(weights)
    slack = Fraction(1, 2 * len(positive) - 2)
    given, slots = [0] * len(weights), []
    for j in range(1, sum(weights) + 1):
        eligible = [i for i in positive if shares[i] * j - given[i] >= slack]
        chosen = min(eligible, key=lambda i: (1 - slack - (shares[i] * j - given[i])) / shares[i])
        given[chosen] += 1
        slots.append(chosen)
    return slots


class Oracle:
    """Computes row by row from the start, without the skipping that could go wrong."""

    def __init__(self, corpora, stages, length, seed):
        self.corpora, self.stages, self.length, self.seed = corpora, stages, length, seed

    def rows(self, stop):
        given = [0] * len(self.corpora)
        for (start, weights), end in zip(self.stages, [*(s for s, _ in self.stages[1:]), stop], strict=True):
            divisor = np.gcd.reduce(weights)
            slots = oracle_chairman([int(weight // divisor) for weight in weights])
            for row in range(start, end):
                corpus = slots[(row - start) % len(slots)]
                yield self.place(corpus, given[corpus])
                given[corpus] += 1

    def place(self, corpus, rank):
        key, size = self.corpora[corpus]
        n = max(1, size // self.length - 1)
        spare = size - 1 - n * self.length
        epoch = rank // n
        epoch_key = combine(combine(mix(self.seed), key), epoch)
        index = oracle_permutation(n, epoch_key, rank % n)
        phase = combine(epoch_key, int.from_bytes(b"phase", "big")) % (min(spare, self.length - 1) + 1)
        return corpus, rank, epoch, index, phase + index * self.length


def permutation(n: int, key: int) -> np.ndarray:
    images = np.empty(n, np.uint64)
    tokens.permutation(n, key, images)
    return images


def is_bijection(n: int, key: int) -> bool:
    images = permutation(n, key)
    return bool(images.max() < n and (np.bincount(images.astype(np.int64), minlength=n) == 1).all())


def test_bijection_for_every_small_n():
    assert [n for n in range(1, 4097) if not is_bijection(n, key=n * 7919)] == []


def test_bijection_around_powers_of_two():
    sizes = [2**k + d for k in range(12, 23) for d in (-1, 0, 1)]
    assert [n for n in sizes if not is_bijection(n, key=1)] == []


def test_permutation_is_the_oracles():
    for n in [1, 2, 3, 7, 64, 65, 1000]:
        assert permutation(n, 99).tolist() == [oracle_permutation(n, 99, i) for i in range(n)]


def chi_square(counts: np.ndarray, drawn: float = 0.0) -> float:
    """Number of standard deviations by which the counts are less uniform than expected by chance.

    drawn: the share that is drawn, without replacement, which makes counts more uniform.
    """
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() / (1 - drawn) - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("n", [65536, 65537, 100_003])
def test_low_bits_are_flat(n):
    """In every window of the shuffled order, the rows' low bits and high parts are as uniform as by chance."""
    scores = []
    for key in range(8):
        images = permutation(n, mix(key)).astype(np.int64)
        for window in np.array_split(images, 8)[:-1]:
            scores += [chi_square(np.bincount(window % 2**bits, minlength=2**bits), 1 / 8) for bits in (1, 4, 6)]
            scores.append(chi_square(np.bincount(window * 32 // n, minlength=32), 1 / 8))
    scores = np.array(scores)
    assert scores.max() < 10  # of 224; the single bit's distribution has a long tail
    assert abs(scores.mean()) < 0.2
    assert scores.std() > 0.5  # and not more uniform than by chance either


def test_neighbours_part():
    """A row's place is independent of the next row's place, and of its own place in the next epoch."""
    n = 50_000
    images, others = (permutation(n, key).astype(np.int64) for key in (5, 6))
    for pairs in (images[1:] - images[:-1], images - others):
        assert abs(chi_square(np.bincount(pairs % n * 64 // n, minlength=64))) < 6


def test_shares_hold_at_every_prefix():
    draw = random.Random(0)
    for _ in range(150):
        weights = [draw.randint(1, draw.choice([3, 20, 150])) for _ in range(draw.randint(2, 12))]
        slots = np.array(tokens.chairman(weights))
        counts = np.cumsum(slots[:, None] == np.arange(len(weights)), axis=0)
        shares = np.arange(1, len(slots) + 1)[:, None] * np.array(weights) / sum(weights)
        assert np.abs(counts - shares).max() <= 1 - 1 / (2 * len(weights) - 2) + 1e-9, weights
        assert counts[-1].tolist() == weights


def test_chairman_is_the_oracles():
    draw = random.Random(1)
    for _ in range(40):
        weights = [draw.randint(0, 9) for _ in range(draw.randint(1, 12))]
        if any(weights):
            assert tokens.chairman(weights) == oracle_chairman(weights), weights


@pytest.mark.parametrize("seed", range(12))
def test_stream_is_the_oracles(seed):
    draw = random.Random(seed)
    n, length = draw.randint(1, 5), draw.choice([1, 2, 7, 32])
    corpora = [(draw.getrandbits(64), draw.randint(length + 1, 40 * length)) for _ in range(n)]
    starts = [0, *sorted(draw.sample(range(1, 300), draw.randint(0, 3)))]
    stages = [(start, [draw.randint(0, 5) for _ in range(n - 1)] + [draw.randint(1, 5)]) for start in starts]
    order = tokens.Order(corpora, stages, length, seed)
    expected = list(Oracle(corpora, stages, length, seed).rows(500))
    assert [order.at(row) for row in range(500)] == expected


def test_each_epoch_reads_each_row_once_from_its_own_offset():
    length, size = 16, 1000
    order = tokens.Order([(1, size)], [(0, [1])], length, 3)
    rows = order.rows(0)
    phases = set()
    for epoch in range(20):
        places = [order.at(epoch * rows + i) for i in range(rows)]
        assert {place[2] for place in places} == {epoch}
        assert sorted(place[3] for place in places) == list(range(rows))
        offsets = {place[4] - place[3] * length for place in places}
        assert len(offsets) == 1
        phases |= offsets
        assert all(place[4] >= 0 and place[4] + length < size for place in places)
    assert len(phases) > 8


def test_a_corpus_of_one_row():
    order = tokens.Order([(1, 17)], [(0, [1])], 16, 3)
    assert [order.at(row) for row in range(3)] == [(0, row, row, 0, 0) for row in range(3)]


def test_seeds_names_and_epochs_shuffle_differently():
    def rows(key, seed, start=0):
        order = tokens.Order([(key, 100_000)], [(0, [1])], 10, seed)
        return [order.at(start + i)[3] for i in range(50)], order.rows(0)

    base, epoch = rows(1, 1)
    for other in (rows(2, 1), rows(1, 2), rows(1, 1, start=epoch)):
        assert sum(a == b for a, b in zip(base, other[0], strict=True)) < 3


def test_stages_go_on_where_the_corpus_was():
    order = tokens.Order([(1, 5000), (2, 5000)], [(0, [3, 1]), (101, [0, 1]), (150, [1, 1])], 10, 0)
    ranks = {0: [], 1: []}
    for row in range(300):
        corpus, rank, *_ = order.at(row)
        ranks[corpus].append(rank)
    assert all(seen == list(range(len(seen))) for seen in ranks.values())
    assert Counter(order.at(row)[0] for row in range(101, 150)) == {1: 49}


def test_the_order_is_a_promise():
    """Later versions can resume a checkpoint only if these values never change."""
    order = tokens.Order([(11, 10**6), (22, 10**11)], [(0, [4, 1]), (10**9, [1, 1])], 2048, 1337)
    assert [order.at(row) for row in (0, 1, 10**6, 10**9 + 1, 10**12)] == PROMISE


PROMISE = [
    (0, 0, 0, 189, 387720),
    (0, 1, 0, 1, 2696),
    (0, 800000, 1642, 348, 714063),
    (1, 200000000, 4, 10769873, 22056701938),
    (0, 500300000000, 1027310061, 153, 314361),
]


@pytest.mark.parametrize(
    ("corpora", "stages", "message"),
    [
        ([(1, 100)], [(0, [0])], "all weights of a stage are 0"),
        ([(1, 100), (2, 100)], [(0, [2**19, 2**19 + 1])], "more than 2\\^20"),
        ([(1, 100), (2, 100)], [(0, [2**63, 2**63 + 1])], "more than 2\\^20"),
        ([(1, 100)], [(0, [1, 1])], "one weight for each corpus"),
        ([(1, 100)], [(5, [1])], "must start at row 0"),
        ([(1, 100)], [(0, [1]), (7, [1]), (7, [1])], "ascending rows"),
        ([(1, 10)], [(0, [1])], "shorter than one row"),
        ([], [(0, [])], "1 to 65536 corpora"),
    ],
)
def test_refusals(corpora, stages, message):
    with pytest.raises(ValueError, match=message):
        tokens.Order(corpora, stages, 10, 0)


def test_rows_beyond_the_last():
    order = tokens.Order([(1, 100), (2, 100)], [(0, [2, 1])], 10, 0)
    assert order.at(2**62 - 1)[1] > 2**60
    with pytest.raises(ValueError, match="beyond 2\\^62"):
        order.at(2**62)

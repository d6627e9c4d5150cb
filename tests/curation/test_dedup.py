"""Exact and near deduplication: against a dictionary of texts, and against exact Jaccard similarities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from curation_files import as_documents, changed, log, parts, step, text, write_lines

from phi_fast.curation.clusters import Clusters
from phi_fast.curation.documents import CurateError
from phi_fast.curation.exact import ExactDuplicates, normalized
from phi_fast.curation.near import NearDuplicates, NearSettings


def grams(sample: str, n: int = 5) -> set[tuple[str, ...]]:
    parts = sample.lower().split()
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}


def jaccard(a: str, b: str) -> float:
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


@pytest.mark.parametrize("memory", [2**16, 2**28])
def test_exact_duplicates_are_those_of_a_dictionary(tmp_path: Path, memory: int) -> None:
    """Also with buffers so small that the hashes are compared in many parts."""
    texts = [text(i % 700, 20) for i in range(2000)]
    texts[5] = texts[3].upper().replace("\n", " \t\n\n")
    texts[10], texts[20] = "naïve", "nai\u0308ve"
    source = write_lines(tmp_path / "a.jsonl", [{"text": one, "id": f"d{i}"} for i, one in enumerate(texts)])
    report = step(ExactDuplicates(), source, tmp_path / "out", memory=memory)
    seen: dict[str, str] = {}
    expected = []
    for i, one in enumerate(texts):
        key = " ".join(one.replace("i\u0308", "ï").lower().split())
        if key in seen:
            expected.append({"id": f"d{i}", "reason": "exact-dedup", "repeats": seen[key]})
        else:
            seen[key] = f"d{i}"
    assert log(tmp_path / "out", "dropped") == expected
    kept = parts(tmp_path / "out")
    assert [one["id"] for one in kept] == list(seen.values())
    assert report.counts.documents_in == 2000 and report.counts.documents_out == len(kept) == len(seen)
    assert report.counts.dropped == {"exact-dedup": 2000 - len(seen)}
    assert report.counts.bytes_in == sum(len(one.encode()) for one in texts)


def test_normalized_texts_differ_in_words_only() -> None:
    assert normalized(" A\n b\u00a0C ") == "a b c"
    assert normalized("a-b") != normalized("a b")


@pytest.mark.parametrize("memory", [2**16, 2**28])
def test_near_duplicates_above_the_threshold_are_found_and_others_kept(tmp_path: Path, memory: int) -> None:
    texts = [text(i) for i in range(150)]
    planted = {i: changed(texts[i], 0.05, i) for i in range(50)}  # similarity about 0.85 to 0.95
    below = {i: changed(texts[i], 0.4, i) for i in range(50, 100)}  # about 0.4
    texts += [*planted.values(), *below.values()]
    source = write_lines(tmp_path / "a.jsonl", [{"text": one, "id": f"d{i}"} for i, one in enumerate(texts)])
    report = step(NearDuplicates(), source, tmp_path / "out", memory=memory)
    dropped = {one["id"]: one["repeats"] for one in log(tmp_path / "out", "dropped")}
    alike = {i: jaccard(texts[i], planted[i]) for i in planted}
    assert min(alike.values()) > 0.8 and max(jaccard(texts[i], below[i]) for i in below) < 0.6
    expected = {f"d{150 + i}": f"d{i}" for i in planted}
    assert dropped.items() <= expected.items()  # no false ones
    assert len(dropped) >= 48  # banding finds 0.8 with probability 0.92, and 0.9 with 0.9997
    assert report.notes["documents_not_compared"] == 0
    assert report.counts.documents_out == len(texts) - len(dropped)


def test_the_signatures_estimate_jaccard_similarity() -> None:
    """rensa's estimate is unbiased, with no more spread than independent hashes have."""
    settings = NearSettings(bands=16, rows=16)
    made = NearDuplicates(settings)
    pairs = [(text(i, 200), changed(text(i, 200), share, i)) for share in (0.03, 0.1, 0.3) for i in range(60)]
    rows = made.survey(as_documents([one for pair in pairs for one in pair]))["signature"]
    estimate = (rows[0::2] == rows[1::2]).mean(1)
    true = np.array([jaccard(*pair) for pair in pairs])
    error = (estimate - true) / np.sqrt(true * (1 - true) / 256)
    assert abs(error.mean()) < 4 / np.sqrt(len(pairs)) and error.std() < 1.15


def test_a_bucket_of_unlike_documents_is_compared_in_rounds(tmp_path: Path) -> None:
    """One row per band makes buckets of documents that are not alike; each pair of duplicates in them is found."""
    common = " ".join(text(999, 60).split())
    texts = [f"{common} {text(i, 60)}" for i in range(40)]  # similarity about 1/3 to each other
    texts += [changed(one, 0.02, i) for i, one in enumerate(texts)]
    source = write_lines(tmp_path / "a.jsonl", [{"text": one, "id": f"d{i}"} for i, one in enumerate(texts)])
    step(NearDuplicates(NearSettings(bands=20, rows=1)), source, tmp_path / "out")
    assert {(one["id"], one["repeats"]) for one in log(tmp_path / "out", "dropped")} == {
        (f"d{40 + i}", f"d{i}") for i in range(40)
    }


def test_documents_without_words_are_no_duplicates(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": one} for one in ("", "!!!", "...", "two words", "two words")])
    assert step(NearDuplicates(), source, tmp_path / "out").counts.dropped == {"near-dedup": 1}


def test_clusters_are_those_of_a_search() -> None:
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, 300, 200), draw.integers(0, 300, 200)
    found = Clusters(300)
    for first in range(0, 200, 37):
        found.join(left[first : first + 37], right[first : first + 37])
    near: dict[int, set[int]] = {i: {i} for i in range(300)}
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        if near[a] is not near[b]:
            near[a] |= near[b]
            for member in near[a]:
                near[member] = near[a]
    dropped, of = found.duplicates()
    assert dict(zip(dropped.tolist(), of.tolist(), strict=True)) == {i: min(s) for i, s in near.items() if min(s) != i}


@pytest.mark.parametrize("bad", [{"bands": 0}, {"threshold": 0}, {"threshold": 1.5}, {"ngram": 0}, {"seed": -1}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(CurateError, match=next(iter(bad))):
        NearDuplicates(NearSettings(**bad))

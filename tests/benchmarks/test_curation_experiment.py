"""The corpus of benchmarks/experiments/curation.py holds what it says, and its tables count right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from benchmarks.experiments import curation
from benchmarks.experiments.curation_corpus import Planted, grams, jaccard, make


def test_similarity_by_hand() -> None:
    assert len(grams("a b c d e f")) == 2
    assert jaccard("a b c d e f", "A, b c d e") == 0.5


@pytest.mark.slow
def test_the_corpus_is_as_recorded(tmp_path: Path) -> None:
    planted = make(tmp_path / "c", 1.0, 0)
    with zstandard.open(tmp_path / "c" / "corpus.jsonl.zst", "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    texts = {}
    for line in lines:
        try:
            record = json.loads(line)
            record["text"].encode()
            texts[record["id"]] = record["text"]
        except (ValueError, TypeError, KeyError):
            continue
    assert len(texts) == planted.documents == len(lines) - planted.malformed
    assert sum(len(text.encode()) for text in texts.values()) == planted.bytes >= 10**6
    assert planted.exact and all(
        texts[name].lower().split() == texts[original].lower().split() for name, original in planted.exact.items()
    )
    for name, (original, similarity) in planted.near.items():
        assert jaccard(texts[name], texts[original]) == similarity
    questions = [json.loads(line).get("question") for line in (tmp_path / "c" / "benchmark.jsonl").open()][:100]
    assert all(any(question in texts[name] for name in planted.texts) for question in questions)
    assert len(planted.programs) == len(planted.texts) == 100
    assert make(tmp_path / "c", 1.0, 0) == planted


def test_the_tables_count_what_was_found(tmp_path: Path) -> None:
    planted = Planted({"e": "a"}, {"n": ("a", 0.83), "m": ("a", 0.55)}, ["t"], ["p"], malformed=2)
    lists = {
        "exact-dedup": [{"id": "e", "reason": "exact-dedup", "repeats": "a"}],
        "near-dedup": [{"id": one, "reason": "near-dedup", "repeats": "a"} for one in ("n", "e", "stranger")],
        "decontaminate": [{"id": "t", "reason": "benchmark n-gram"}, {"id": "x", "reason": "benchmark syntax"}],
    }
    for step, records in lists.items():
        (tmp_path / step).mkdir()
        (tmp_path / step / "dropped.log").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "exact-dedup" / "report.json").write_text(json.dumps({"counts": {"malformed": 2}}))
    table = curation.quality(tmp_path, planted)
    assert "| exact duplicates | 1 | 1 | 0 |" in table
    assert "| benchmark n-gram | 1 | 1 | 0 |" in table and "| benchmark syntax | 0 | 1 | 1 |" in table
    assert "| 0.8 to 0.85 | 1 | 1 | 1.000 |" in table and "| 0.5 to 0.6 | 1 | 0 | 0.000 |" in table
    assert "3 dropped, 1 of them not planted" in table and "0.6667" in table
    assert "2 counted of 2 planted" in table
    cost = curation.Cost("x", 100, wall=9, processor=50, peak=123)
    assert "| x | 2.00 | 50 | 9 | 123 |" in curation.table([cost])

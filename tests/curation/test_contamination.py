"""Decontamination on a benchmark of three records: every planted part is found, whatever does not count is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_files import as_documents, text, write_lines

from phi_fast.curation.benchmarks import read_items
from phi_fast.curation.contamination import ContaminationSettings, Decontamination
from phi_fast.curation.documents import CurateError, Drop
from phi_fast.curation.syntax import functions

PROMPT = '''from typing import List


def nearest_pair(numbers: List[float]) -> float:
    """Find the least distance between two of the given numbers, and return that distance.
    >>> nearest_pair([1.0, 2.5, 4.0])
    1.5
    """
'''
SOLUTION = """    ordered = sorted(numbers)
    best = ordered[1] - ordered[0]
    for i in range(2, len(ordered)):
        if ordered[i] - ordered[i - 1] < best:
            best = ordered[i] - ordered[i - 1]
    return best
"""
RENAMED = '''
class Geometry:
    # holes in a line
    def hole_gap(self_positions):
        """A carpenter drills holes."""
        holes = sorted(self_positions)
        gap = holes[1] - holes[0]
        for k in range(7, len(holes)):
            if holes[k] - holes[k - 3] < gap:
                gap = holes[k] - holes[k - 3]
        return gap
'''
QUESTION = "A baker sells 14 loaves each morning and twice as many cakes; how many things does she sell in a week?"
SHORT = "Green plants make sugar from light, water and air."
RECORDS = [
    {
        "task_id": "Own/0",
        "prompt": PROMPT,
        "canonical_solution": SOLUTION,
        "test": "def check(f):\n    assert f([1, 2]) == 1\n",
    },
    {"question": QUESTION, "answer": "294"},
    {"query": "Question: What is photosynthesis?", "choices": [SHORT, "Rocks."], "gold": 0},
    {"numbers": " ".join(map(str, range(40)))},
]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "own.jsonl", list(RECORDS))


def judged(own: Path, texts: list[str], **settings: float) -> list[Drop | None]:
    made = Decontamination(ContaminationSettings((own,), **settings))  # type: ignore[arg-type]
    return made.judge(as_documents(texts))


def test_every_planted_part_is_found_by_its_ngrams(own: Path) -> None:
    around = text(1), text(2)
    shouted = QUESTION.upper().replace(" ", "  \n").replace(";", " -- ")
    part = " ".join(QUESTION.split()[5:18])
    texts = [f"{around[0]} {planted} {around[1]}" for planted in (QUESTION, shouted, part, SHORT, PROMPT)]
    found = judged(own, texts, match_rate=0)
    assert [drop.reason for drop in found if drop] == ["benchmark n-gram"] * 5
    assert [drop.evidence["benchmark"] for drop in found if drop] == [f"own.jsonl:{i}" for i in (2, 2, 2, 3, 1)]
    assert found[2] is not None
    assert found[2].evidence["found"] == " ".join(part.lower().replace(";", "").split())


def test_what_does_not_count_is_kept(own: Path) -> None:
    """Twelve words of thirteen, a part of a short text, an answer of one word, and counting from 0 to 39."""
    words = QUESTION.split()
    texts = [
        text(3),
        " ".join(words[:12]),
        " ".join(SHORT.split()[:-1]),
        "294",
        "Rocks.",
        " ".join(map(str, range(60))),
    ]
    assert judged(own, texts) == [None] * 6


def test_a_hash_that_is_equal_by_chance_is_no_find(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi_fast.curation import ngrams

    genuine = ngrams.words_of

    def weak(sample: str) -> object:
        words = genuine(sample)
        return type(words)(words.data, words.starts, words.stops, words.hashes & type(words.hashes[0])(7))

    monkeypatch.setattr(ngrams, "words_of", weak)
    monkeypatch.setattr(ngrams, "_LEAST_DISTINCT", 1)
    assert judged(own, [text(i, 3000) for i in range(5)], match_rate=0) == [None] * 5
    assert judged(own, [f"{text(1)} {QUESTION}"], match_rate=0) != [None]


def test_renamed_code_is_found_by_its_syntax(own: Path) -> None:
    fenced = f"The next listing shows it.\n\n```python\n{RENAMED}```\n\nThat was it."
    longer = RENAMED.replace("return gap", "if gap > 3:\n            print(gap, holes)\n        return gap")
    texts = [RENAMED, fenced, longer, "def f(x):\n    return x\n", "def broken(:\n    pass"]
    found = judged(own, texts, ngram=0)
    assert [drop is not None for drop in found] == [True, True, False, False, False]
    assert found[0] is not None
    assert found[0].reason == "benchmark syntax"
    assert found[0].evidence == {"benchmark": "own.jsonl:1", "match_rate": 1.0, "found": "hole_gap"}
    [looser] = judged(own, [longer], ngram=0, match_rate=0.8)
    assert looser is not None
    assert 0.8 <= looser.evidence["match_rate"] < 0.95


def test_the_match_rate_is_that_of_an_edit_distance_written_out(own: Path) -> None:
    """Levenshtein's distance by its recurrence, on the nodes that Python's own walk gives."""
    longer = RENAMED.replace("return gap", "gap += 1\n        return gap")
    [one] = functions(PROMPT + SOLUTION, 1)
    [other] = functions(longer, 1)
    row = list(range(len(other.shape) + 1))
    for i, a in enumerate(one.shape, 1):
        row, above = [i], row
        for j, b in enumerate(other.shape, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    rate = 1 - row[-1] / max(len(one.shape), len(other.shape))
    [drop] = judged(own, [longer], ngram=0, match_rate=0.7)
    assert drop is not None
    assert drop.evidence["match_rate"] == round(rate, 4)


def test_names_constants_docstrings_and_annotations_do_not_count() -> None:
    shapes = [
        next(functions(source, 1)).shape
        for source in (
            "def f(a: int) -> int:\n    'doc'\n    return a + 1",
            "def g(b):\n    # no doc\n    return b + 'x'",
        )
    ]
    assert shapes[0] == shapes[1]
    assert next(functions("def g(b):\n    return b - 'x'", 1)).shape != shapes[0]
    assert [one.name for one in functions("def outer():\n    def inner():\n        pass\n    return inner", 1)] == [
        "inner",
        "outer",
    ]


def test_reordered_words_are_near_by_their_embedding(own: Path) -> None:
    words = QUESTION.rstrip("?").split()
    reordered = " ".join([*words[10:], *words[:10]])
    texts = [f"{text(1)}\n\n{reordered}.\n\n{text(2)}", text(3)]
    assert judged(own, texts) == [None, None]
    found = judged(own, texts, embedding_distance=0.6)
    assert found[0] is not None and found[1] is None
    assert found[0].reason == "benchmark embedding" and found[0].evidence["benchmark"] == "own.jsonl:2"
    assert judged(own, texts, embedding_distance=0.05) == [None, None]


def test_benchmarks_of_any_layout_are_read(tmp_path: Path, own: Path) -> None:
    [program, question, choices, _] = read_items([own])
    assert program.programs == (PROMPT + SOLUTION,) and question.texts == (QUESTION, "294")
    assert choices.texts == ("Question: What is photosynthesis?", SHORT, "Rocks.")
    assert [item.texts for item in read_items([own], ["answer"])] == [("294",)]
    pq.write_table(pa.table({"q": [QUESTION], "choices": [["x", SHORT]]}), tmp_path / "b.parquet")
    assert [item.texts for item in read_items([tmp_path / "b.parquet"])] == [(QUESTION, "x", SHORT)]
    mbpp = {
        "text": "Write a function.",
        "code": f"def f(n):\r\n    return n\n{PROMPT}{SOLUTION}",
        "test_list": ["assert f(1)"],
    }
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(mbpp))
    assert read_items([tmp_path / "mbpp.jsonl"])[0].programs == (mbpp["code"],)


def test_files_and_settings_that_make_no_sense_are_refused(tmp_path: Path, own: Path) -> None:
    (tmp_path / "x.jsonl").write_text("[1]\n")
    for files, settings, message in (
        ((), {}, "name the files"),
        ((tmp_path / "none.jsonl",), {}, "is not a file"),
        ((tmp_path / "x.jsonl",), {}, "x.jsonl:1 holds a JSON list"),
        ((own,), {"benchmark_fields": ("nothing",)}, "holds no texts in the fields nothing"),
        ((own,), {"ngram": 0, "match_rate": 0}, "nothing would be looked for"),
        ((own,), {"match_rate": 2}, "match_rate=2"),
        ((own,), {"embedding_distance": 1, "embedding": "word2vec"}, "no embedding 'word2vec'"),
    ):
        with pytest.raises(CurateError, match=message):
            Decontamination(ContaminationSettings(files, **settings))  # type: ignore[arg-type]

"""The commands of docs/data-curation.md in turn on a small corpus; and what the command says of mistakes."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
from curation_files import parts, write_lines
from test_rules import ENGLISH, prose

from phi_fast.curate import main

PAGE = Path(__file__).parents[2] / "docs" / "data-curation.md"
QUESTION = "How many loaves does a baker sell in a week who sells fourteen each morning of the week?"


def corpus(folder: Path) -> None:
    """raw.jsonl, benchmark.jsonl and labelled.jsonl, which the page's commands read."""
    texts = [prose(ENGLISH, i) for i in range(120)]
    records = [{"text": one, "id": f"d{i}"} for i, one in enumerate(texts)]
    records += [{"text": texts[0].upper(), "id": "exact"}]
    records += [{"text": re.sub("x3", "y3", texts[1]), "id": "near"}]
    records += [{"text": f"{texts[2]}\n{QUESTION}".replace("number2x", "number999x"), "id": "contaminated"}]
    records += [{"text": "short", "id": "short"}]
    write_lines(folder / "raw.jsonl", [*records, b"{"])
    write_lines(folder / "benchmark.jsonl", [{"question": QUESTION, "answer": "98"}])
    draw = random.Random(0)
    labelled = [{"text": one, "score": draw.randrange(5)} for one in texts]
    write_lines(folder / "labelled.jsonl", labelled)


@pytest.mark.slow
def test_the_pages_commands_work_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    for words in lines:
        assert words[:3] == ["python", "-m", "phi_fast.curate"]
        assert main(words[3:]) == 0, words
    ids = [[one["id"] for one in parts(Path("data") / name)] for name in ("unique", "distinct", "clean", "ruled")]
    for kept, before, gone in zip(ids[1:], ids, ("near", "contaminated", "short"), strict=False):
        assert [one for one in before if one not in kept] == [gone]
    assert "exact" not in ids[0] and len(ids[0]) == 123
    kept = parts(Path("data/textbooks"))
    assert all(one["scores"]["education"] >= 2.5 for one in kept)
    report = json.loads(Path("data/textbooks/report.json").read_text())
    assert report["counts"]["documents_out"] == len(kept) and report["counts"]["documents_in"] == 120
    assert "<svg" in Path("data/education.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exact-dedup", "--out", "x"], "name files or folders"),
        (["exact-dedup", "none.jsonl", "--out", "x"], "none.jsonl does not exist"),
        (["exact-dedup", "a.jsonl", "--out", "x", "--workers", "0"], "--workers 0"),
        (["exact-dedup", "a.jsonl", "--out", "x", "--memory-mb", "0"], "memory=0"),
        (["threshold", "a.jsonl", "--out", "x", "--at-least", "nan"], "expected a finite number"),
        (["score", "a.jsonl", "--out", "x", "--classifier", "no.skops"], "no.skops cannot be read"),
        (["train-classifier", "a.jsonl", "--out", "x"], "named NAME.skops"),
        (["page", "a.jsonl", "--out", "x.html", "--at-least", "1"], "none of 1 documents has a score 'education'"),
        (["page", "a.jsonl", "--out", "x.html", "--at-least", "inf"], "expected a finite number"),
        (["near-dedup", "a.jsonl", "--out", "x", "--bands", "0"], "bands=0"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from phi_fast.curation.documents import CurateError
    from phi_fast.curation.near import NearDuplicates

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rensa" else real(name))
    with pytest.raises(CurateError, match=r"needs rensa, which is not installed: pip install 'phi-fast\[curate\]'"):
        NearDuplicates()

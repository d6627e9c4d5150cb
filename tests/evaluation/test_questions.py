"""Rows of every task in every form, with each field invalid in turn: errors name the line, the field and its rule."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from phi_fast.errors import UsageError
from phi_fast.evaluation import generative
from phi_fast.evaluation.local_data import read_rows
from phi_fast.evaluation.questions import FORMS

LETTERED = {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"}
COMPACT = {"query": "Question: which?", "choices": ["red", "blue"], "gold": 1}
SIQA = "Context: Kim left.\nQuestion: Why?\nChoices:\nA. it rained\nB. a dog came\nAnswer:"
MMLU = "Question: which?\n(A) a (B) b (C) c (D) d\n"
GOOD: dict[tuple[str, str], dict[str, Any]] = {
    ("arc_easy", "hub"): {"question": "which?", **LETTERED},
    ("arc_easy", "compact"): COMPACT,
    ("arc_challenge", "hub"): {"question": "which?", **LETTERED},
    ("arc_challenge", "compact"): COMPACT,
    ("openbookqa", "hub"): {"question_stem": "which?", **LETTERED},
    ("openbookqa", "compact"): COMPACT,
    ("boolq", "hub"): {"passage": "p", "question": "q", "label": 1},
    ("boolq", "compact"): {"query": "Passage: p\nQuestion: q?", "gold": 1},
    ("piqa", "hub"): {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    ("piqa", "compact"): {"query": "Question: g\n", "choices": ["a", "b"], "gold": 1},
    ("winogrande", "hub"): {"sentence": "so _ left", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ("winogrande", "compact"): {"context_options": ["so Ann", "so Eve"], "continuation": "left", "gold": 1},
    ("social_iqa", "hub"): {
        "context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3",
    },
    ("social_iqa", "compact"): {"query": SIQA, "choices": ["A", "B"], "gold": 1},
    ("hellaswag", "hub"): {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["x", "y"], "label": "1"},
    ("hellaswag", "compact"): {"query": "a: b", "choices": ["x", "y"], "gold": 1},
    ("mmlu", "hub"): {"question": "q", "choices": list("abcd"), "answer": 3, "subject": "anatomy"},
    ("mmlu", "compact"): {"query": MMLU, "gold": 3, "category": "anatomy"},
    ("gsm8k", "hub"): {"question": "q", "answer": "so\n#### 1,200"},
    ("gsm8k", "compact"): {"context": "q", "answer": "1200"},
    ("humaneval", "hub"): {"task_id": "t", "prompt": "def f():", "entry_point": "f", "test": "def check(f): pass"},
    ("mbpp", "hub"): {"text": "t", "test_list": ["assert f()"]},
    ("squad", "hub"): {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
    ("squad", "compact"): {"text": "Paris is in", "value": "France"},
    ("toxigen", "hub"): {"text": "t", "target_group": "women", "toxicity_ai": 4.0, "toxicity_human": 2.0},
    ("toxigen", "compact"): {
        "text": "t", "target_groups_mixed": ["women"], "toxicity_ai": 1, "toxicity_human": 5,
    },
}  # fmt: skip
MAY_BE_EMPTY = ("ctx_a", "ctx_b")
TAKEN = [("target_group", ["x"]), ("target_groups_mixed", "ab"), ("answer", 7)]
"""(field, value) that are valid although the type differs: one group or several, a number as text or not."""
_LISTS = [None, 7, "ab", {}, [], ["", "b"], ["a", " "], [1, 2], ["a", None], ["a", "\ud800"]]
BAD: dict[type, list[Any]] = {
    str: [None, 7, True, ["x"], {}, "", " \n", "\ud800"],
    list: _LISTS,
    dict: _LISTS,
    int: [None, "x", True, [], 1e301, "", -1, 4, 1.0, "1"],
    float: [None, "x", True, [], 1e301, ""],
}
"""Invalid values, by the type of the field's valid value."""
ALSO: dict[tuple[str, str], list[tuple[str, Any]]] = {
    ("arc_easy", "hub"): [
        ("choices", {"text": [], "label": []}),
        ("choices", {"text": ["a"], "label": ["A"]}),
        ("choices", {"text": ["a", "b"], "label": ["A", "A"]}),
        ("choices", {"text": ["a", "b"], "label": ["A", "B", "C"]}),
        ("choices", {"text": ["a", ""], "label": ["A", "B"]}),
        ("choices", {"text": ["a", "b"]}),
        ("answerKey", "C"),
    ],
    ("arc_easy", "compact"): [("query", "Question: "), ("choices", ["a"]), ("choices", list("abcdefghi"))],
    ("openbookqa", "hub"): [("choices", {"text": [], "label": []}), ("answerKey", "b")],
    ("boolq", "compact"): [("query", "Passage: \nQuestion: q?"), ("query", "Passage: p\nQuestion: ?"), ("query", "q")],
    ("piqa", "compact"): [("choices", ["a"]), ("choices", ["a", "b", "c"])],
    ("winogrande", "hub"): [
        ("sentence", "no blank"), ("sentence", "a _"), ("option2", "Ann"), ("answer", 2), ("answer", "3"),
    ],
    ("winogrande", "compact"): [
        ("context_options", ["so Ann", "so Ann"]),
        ("context_options", ["so ", "so Ann"]),
        ("context_options", ["a _ Ann", "a _ Eve"]),
        ("context_options", ["so Ann"]),
    ],
    ("social_iqa", "hub"): [("label", "0"), ("label", "4"), ("label", 4)],
    ("social_iqa", "compact"): [
        ("query", SIQA.replace("it rained", "")),
        ("query", SIQA.replace("a dog came", " ")),
        ("query", SIQA.replace("Why?", "")),
        ("query", SIQA.replace("Kim left.", "")),
        ("choices", ["A", "B", "C"]),
    ],
    ("hellaswag", "hub"): [("label", "2"), ("label", -1), ("endings", ["x"])],
    ("mmlu", "hub"): [("choices", list("abc")), ("split", 7)],
    ("mmlu", "compact"): [("query", MMLU.replace("(D) d", "(D) ")), ("query", "Question: which?")],
    ("gsm8k", "hub"): [("answer", "#### many"), ("answer", "nan"), ("answer", "#### ")],
    ("humaneval", "hub"): [("entry_point", "f()"), ("canonical_solution", 7)],
    ("mbpp", "hub"): [("test_list", []), ("test_setup_code", 7), ("test_imports", "import math"), ("task_id", [])],
    ("squad", "hub"): [
        ("answers", []), ("answers", [""]), ("answers", {"text": []}), ("answers", {"text": [" "]}), ("title", 7),
    ],
    ("toxigen", "hub"): [("label", 7), ("label", "")],
}  # fmt: skip


def spoilt(form: tuple[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """(field, row) with the field invalid in every way that its valid value's type and place allow."""
    good, rows = GOOD[form], []
    for field, value in good.items():
        if field in MAY_BE_EMPTY:
            continue
        rows.append((field, {name: other for name, other in good.items() if name != field}))
        bad = BAD[type(value)] if not field.startswith("toxicity") else BAD[float]
        rows += [(field, {**good, field: each}) for each in bad if (field, each) not in TAKEN]
    return rows + [(field, {**good, field: each}) for field, each in ALSO.get(form, [])]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_table_has_every_task() -> None:
    assert {task for task, _ in GOOD} == set(FORMS)


@pytest.mark.parametrize("form", GOOD, ids="-".join)
def test_a_good_row_is_taken(form: tuple[str, str], tmp_path: Path) -> None:
    task, _ = form
    assert len(read_rows(write(tmp_path / "rows.jsonl", [GOOD[form]] * 2), task)) == 2


@pytest.mark.parametrize("form", GOOD, ids="-".join)
def test_each_field_that_is_spoilt_is_named_with_its_file_and_line(form: tuple[str, str], tmp_path: Path) -> None:
    task, _ = form
    for field, row in spoilt(form):
        file = write(tmp_path / "rows.jsonl", [GOOD[form], row])
        with pytest.raises(UsageError) as caught:
            print(row, "is taken as", read_rows(file, task))
        message = str(caught.value)
        assert message.startswith(f"{file}:2 is no question of {task}: "), row
        assert ", expected " in message, row
        if field in row:  # without the field, the row may be read in the other form
            assert field in message.partition(", expected")[0], row


@pytest.mark.parametrize("form", GOOD, ids="-".join)
@pytest.mark.parametrize("row", [[], "text", 7, None, True, {}])
def test_what_is_no_row_is_named(form: tuple[str, str], row: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD[form], row])
    with pytest.raises(UsageError, match=rf"rows.jsonl:2 is no question of {form[0]}: .*, expected "):
        read_rows(file, form[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no questions"),
        (b"\n \n", "has no questions"),
        (b"\xff\xfe{\0", "rows.jsonl:1 is not JSON"),
        (b"\0\x01\x02", "rows.jsonl:1 is not JSON"),
        (b'{"goal": ', "rows.jsonl:1 is not JSON"),
        (b"[" * 5000, "rows.jsonl:1 nests deeper"),
    ],
)
def test_a_file_that_holds_no_json_lines_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    """An incomplete last line is an error here: nobody appends to questions, and none may be lost."""
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_rows(tmp_path / "rows.jsonl", "piqa")


def test_hellaswag_in_two_forms_is_refused(tmp_path: Path) -> None:
    """lm-eval cleans either all of a file's questions or none."""
    file = write(tmp_path / "rows.jsonl", [GOOD["hellaswag", "hub"], GOOD["hellaswag", "compact"]])
    with pytest.raises(UsageError, match=r"rows.jsonl:2 has the compact form, the lines before it the hub's fields"):
        read_rows(file, "hellaswag")


@pytest.mark.parametrize("task", generative.HUB)
def test_rows_of_the_hub_are_held_to_the_same_form(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, split = generative.HUB[task]
    for field, row in spoilt((task, "hub")):
        hub = types.SimpleNamespace(load_dataset=lambda *_, row=row, **__: [GOOD[task, "hub"], row])
        monkeypatch.setitem(sys.modules, "datasets", hub)
        with pytest.raises(UsageError) as caught:
            print(row, "is taken as", generative.hub_rows(task))
        assert str(caught.value).startswith(f"{name} ({split}), row 1 is no question of {task}: "), (field, row)


def test_a_toxicity_of_zero_is_refused_wherever_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**GOOD["toxigen", "hub"], "toxicity_ai": 0, "toxicity_human": 0.0}
    with pytest.raises(UsageError, match="toxicity_ai is 0, expected a toxicity above 0"):
        read_rows(write(tmp_path / "rows.jsonl", [row]), "toxigen")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: [row]))
    with pytest.raises(UsageError, match=r"skg/toxigen-data \(test\), row 0 .*toxicity_ai is 0, expected a toxicity"):
        generative.hub_rows("toxigen")

"""Checks questions of each task, from the hub's data set or a local file, and gives them the hub's fields.

A row holds either the fields of the hub's data set that lm-eval uses, or the compact form {"query", "choices", "gold"}
(and its variants below). The hub's fields are rebuilt from the compact form, so that prompts are exactly lm-eval's own.
docs/evaluation.md lists both forms for every task. Only the fields that are used are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..json_files import Fields, JsonFileError

Row = dict[str, Any]
LETTERS = "ABCDEFGH"


class QuestionError(JsonFileError):
    """A row is not a valid question; the message names the file, the line, the field and what was expected."""


def question(task: str, value: Any, where: str) -> Row:
    """Convert a row to the fields of the hub's data set. where: the row's place for error messages, as "FILE:LINE".

    Raises QuestionError for a field that is missing, empty or of another type, and for an answer that is none of the
    choices: an empty text has no likelihood, and such an answer can never be correct.
    """
    where = f"{where} is no question of {task}"
    if not isinstance(value, dict):
        raise QuestionError(f"{where}: it is a JSON {type(value).__name__}, expected an object")
    return FORMS[task](Fields(value, where, error=QuestionError))


def _filled(row: Fields, name: str) -> str:
    """A text with more than white space, so that it has at least one token."""
    value = row.values.get(name)
    return value if isinstance(value, str) and _is_filled(value) else row.refuse(name, "text that is not empty")


def _texts(row: Fields, name: str, least: int, most: int = len(LETTERS)) -> list[str]:
    values = row.items(name)
    number = f"{least}" if least == most else f"{least} to {most}"
    if not least <= len(values) <= most:
        row.refuse(name, f"{number} texts")
    for i, value in enumerate(values):
        if not isinstance(value, str) or not _is_filled(value):
            row.refuse(name, f"{number} texts that are not empty: number {i + 1} is {value!r}"[:160])
    return values


def _is_filled(text: str) -> bool:
    """Also False for half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    return bool(text.strip()) and text == text.encode("utf-8", "ignore").decode()


def _one_of(row: Fields, name: str, choices: list[Any]) -> Any:
    """The field's value, which must equal one of the choices and have its type: true is not 1."""
    value = row.values.get(name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        row.refuse(name, f"one of {', '.join(map(repr, choices))}")
    return value


def _index(row: Fields, name: str, choices: int) -> int:
    index: int = _one_of(row, name, list(range(choices)))
    return index


def _numbered(row: Fields, name: str, numbers: range) -> str:
    """A label that is text on the hub and may be a number elsewhere."""
    return str(_one_of(row, name, [*map(str, numbers), *numbers]))


def _match(row: Fields, name: str, pattern: str, form: str) -> tuple[str, ...]:
    """The groups of `pattern` in a text. None of them may be empty."""
    found = re.fullmatch(pattern, _filled(row, name), re.DOTALL)
    if not found or not all(group.strip() for group in found.groups()):
        row.refuse(name, form)
    return found.groups()


def _lettered(question_field: str) -> Callable[[Fields], Row]:
    """The form of arc's and openbookqa's questions. question_field: the name of the field with the question."""

    def form(row: Fields) -> Row:
        if "query" in row.values:
            choices = _texts(row, "choices", 2)
            labels = list(LETTERS[: len(choices)])
            (text,) = _match(row, "query", "(?:Question: )?(.*)", '"Question: …"')
            answer = labels[_index(row, "gold", len(choices))]
        else:
            text, inner = _filled(row, question_field), row.inner("choices")
            choices = _texts(inner, "text", 2)
            labels = _texts(inner, "label", len(choices), len(choices))
            if len(set(labels)) < len(labels):
                inner.refuse("label", "a different label for each choice")
            answer = _one_of(row, "answerKey", labels)
        return {question_field: text, "choices": {"text": choices, "label": labels}, "answerKey": answer}

    return form


def _boolq(row: Fields) -> Row:
    """lm-eval adds the question mark itself, so it is removed here."""
    if "query" not in row.values:
        texts = {name: _filled(row, name) for name in ("passage", "question")}
        return {**texts, "label": _index(row, "label", 2)}
    # lm-eval's prompt is passage, newline, question; the data set's passage does not begin with "Passage: ".
    form = '"Passage: …\\nQuestion: …"'
    passage, asked = _match(row, "query", r"Passage: (.*)\nQuestion: \s*(.*?)\??\s*", form)
    return {"passage": passage, "question": asked, "label": _index(row, "gold", 2)}


def _piqa(row: Fields) -> Row:
    if "query" not in row.values:
        return {**{name: _filled(row, name) for name in ("goal", "sol1", "sol2")}, "label": _index(row, "label", 2)}
    (goal,) = _match(row, "query", "(?:Question: )?(.*?)\n?", '"Question: …\\n"')
    first, second = _texts(row, "choices", 2, 2)
    return {"goal": goal, "sol1": first, "sol2": second, "label": _index(row, "gold", 2)}


def _winogrande(row: Fields) -> Row:
    """Joins two contexts that differ in their last words into one sentence with a blank."""
    if "context_options" not in row.values:
        sentence = _filled(row, "sentence")
        if not sentence.partition("_")[2].strip():
            row.refuse("sentence", 'text with a blank, "_", and more text behind it')
        option1, option2 = _filled(row, "option1"), _filled(row, "option2")
        if option1 == option2:
            row.refuse("option2", "another text than option1")
        answer = _one_of(row, "answer", ["1", "2"])
        return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}
    first, second = _texts(row, "context_options", 2, 2)
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    shared = first.rfind(" ", 0, shared) + 1
    option1, option2 = first[shared:], second[shared:]
    if not option1.strip() or not option2.strip() or option1 == option2 or "_" in first[:shared]:
        row.refuse("context_options", 'two contexts without "_" that differ in their last words')
    return {
        "sentence": f"{first[:shared]}_ {_filled(row, 'continuation').strip()}",
        "option1": option1,
        "option2": option2,
        "answer": str(_index(row, "gold", 2) + 1),
    }


def _social_iqa(row: Fields) -> Row:
    """Rows in the compact form may have two answers, the data set's have three; `answers` lists them."""
    if "query" not in row.values:
        answers = [_filled(row, f"answer{letter}") for letter in "ABC"]
        texts = {name: _filled(row, name) for name in ("context", "question")}
        return {**texts, "answers": answers, "label": _numbered(row, "label", range(1, 4))}
    form = '"Context: …\\nQuestion: …\\nChoices:\\nA. …\\nAnswer:"'
    pattern = r"Context: (.*)\nQuestion: (.*)\nChoices:\n(.*)\nAnswer:"
    context, asked, listed = _match(row, "query", pattern, form)
    answers = re.split(r"(?:^|\n)[A-H]\. ", listed)[1:]
    choices = _texts(row, "choices", 2)
    if not all(map(str.strip, answers)):
        row.refuse("query", "answers that are not empty")
    if len(answers) != len(choices):
        row.refuse("choices", f"{len(answers)} texts, as the query has answers")
    return {
        "context": context,
        "question": asked,
        "answers": answers,
        "label": str(1 + _index(row, "gold", len(answers))),
    }


def _hellaswag(row: Fields) -> Row:
    """Questions in the compact form are already cleaned; lm-eval cleans the hub's."""
    if "query" in row.values:
        query, choices = _filled(row, "query"), _texts(row, "choices", 2)
        gold = _index(row, "gold", len(choices))
        return {"query": query, "choices": choices, "label": str(gold), "gold": gold}
    endings = _texts(row, "endings", 2)
    before = {"activity_label": _filled(row, "activity_label"), "ctx_a": row.text("ctx_a"), "ctx_b": row.text("ctx_b")}
    if not before["ctx_a"].strip():
        _filled(row, "ctx_b")
    return {**before, "endings": endings, "label": _numbered(row, "label", range(len(endings)))}


def _mmlu(row: Fields) -> Row:
    split = row.text("split") if "split" in row else "test"
    if "query" in row.values:
        form = '"Question: …\\n(A) … (B) … (C) … (D) …"'
        pattern = r"Question: (.*)\n\(A\) (.*) \(B\) (.*) \(C\) (.*) \(D\) (.*?)\s*"
        asked, *choices = _match(row, "query", pattern, form)
        answer, subject = _index(row, "gold", 4), _filled(row, "category")
    else:
        asked, choices = _filled(row, "question"), _texts(row, "choices", 4, 4)
        answer, subject = _index(row, "answer", 4), _filled(row, "subject")
    return {"question": asked, "choices": choices, "answer": answer, "subject": subject, "split": split}


def _gsm8k(row: Fields) -> Row:
    asked = _filled(row, "question" if "question" in row.values else "context")
    answer = str(row.values.get("answer", "")).rpartition("####")[2].strip().replace(",", "")
    if not re.fullmatch(r"-?\d+(\.\d+)?", answer, re.ASCII):
        row.refuse("answer", 'a number, or text that ends with "#### " and a number')
    return {"question": asked, "answer": answer}


def _humaneval(row: Fields) -> Row:
    texts = {name: _filled(row, name) for name in ("task_id", "prompt", "entry_point", "test")}
    if not texts["entry_point"].isidentifier():
        row.refuse("entry_point", "the name of a function")
    return {**texts, "canonical_solution": row.text("canonical_solution") if "canonical_solution" in row else ""}


def _mbpp(row: Fields) -> Row:
    optional = {name: row.text(name) for name in ("test_setup_code", "code") if name in row}
    if "test_imports" in row:
        optional["test_setup_code"] = optional.get("test_setup_code") or "\n".join(row.texts("test_imports"))
    if "task_id" in row:
        optional["task_id"] = (
            row.text("task_id") if isinstance(row.values["task_id"], str) else str(row.whole("task_id"))
        )
    text = _filled(row, "text" if "text" in row.values else "prompt")
    return {"text": text, "test_list": _texts(row, "test_list", 1, 1000), **optional}


def _squad(row: Fields) -> Row:
    if "value" in row.values:  # squad_completion's form
        return {"prompt": _filled(row, "text").strip(), "answers": [_filled(row, "value").strip()]}
    answers = row.inner("answers") if isinstance(row.values.get("answers"), dict) else row
    title = f"Title: {row.text('title')}\n\n" if row.values.get("title") else ""
    prompt = f"{title}Background: {_filled(row, 'context')}\n\nQuestion: {_filled(row, 'question')}\n\nAnswer:"
    return {"prompt": prompt, "answers": _texts(answers, "answers" if answers is row else "text", 1, 1000)}


def _toxigen(row: Fields) -> Row:
    name = "target_groups_mixed" if "target_groups_mixed" in row.values else "target_group"
    groups = _texts(row, name, 1, 1000) if isinstance(row.values.get(name), list) else [_filled(row, name)]
    scores = row.number("toxicity_ai"), row.number("toxicity_human")
    if not max(scores) > 0:  # a sentence's perplexity is divided by it
        row.refuse("toxicity_ai", "a toxicity above 0, here or in toxicity_human: the scale is 1 to 5")
    harmful = _filled(row, "label") == "hate" if "label" in row else sum(scores) > 5.5  # lm-eval's rule
    return {"text": _filled(row, "text"), "groups": groups, "toxicity": max(scores), "harmful": harmful}


FORMS: dict[str, Callable[[Fields], Row]] = {
    "arc_easy": _lettered("question"),
    "arc_challenge": _lettered("question"),
    "openbookqa": _lettered("question_stem"),
    "boolq": _boolq,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "social_iqa": _social_iqa,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "squad": _squad,
    "toxigen": _toxigen,
}
"""For each task, the function that checks a row and returns it with the hub's fields."""

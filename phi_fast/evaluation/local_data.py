"""Questions from local JSON-lines files: `DIR/TASK.jsonl`, a question per line.

A line holds either the fields of the hub's data set that lm-eval uses, or the compact form {"query", "choices", "gold"}
(and its relatives below), from which the hub's fields are rebuilt, so that prompts are the harness's own to the letter.
docs/evaluation.md lists both for every task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..json_files import read_regular

Row = dict[str, Any]
LETTERS = "ABCDEFGH"
# Other names under which a task's questions are found.
FILE_NAMES = {
    "humaneval": ("human_eval",),
    "openbookqa": ("openbook_qa",),
    "social_iqa": ("siqa",),
}


TEXTS = (
    *("text", "question", "question_stem", "query", "goal", "passage", "sentence", "prompt", "context"),
    *("sol1", "sol2", "option1", "option2", "answerA", "answerB", "answerC", "test", "entry_point"),
)
"""Fields of one text, each put before a model or run as it is."""
LISTS = {"choices": 2, "endings": 2, "answers": 1, "test_list": 1, "groups": 1}
"""Fields of several texts, and the fewest that a question has."""
MAX_BYTES = 2**32
"""Of a file of questions."""


def find_file(folder: Path, task: str) -> Path | None:
    """The file of a task: its own name, a known other one, or either with `_small` behind it."""
    names = (task, *FILE_NAMES.get(task, ()))
    candidates = [folder / f"{name}{suffix}.jsonl" for suffix in ("", "_small") for name in names]
    return next((path for path in candidates if path.exists()), None)


def read_rows(path: Path, task: str) -> list[Row]:
    """Every question of a file, with the fields of the hub's data set. Raises UsageError naming the line at fault."""
    rows = []
    for number, line in enumerate(read_regular(path, MAX_BYTES).split(b"\n"), 1):
        if line.strip():
            rows.append(_question(partial(json.loads, line), task, f"{path}:{number}"))
    if not rows:
        raise UsageError(f"{path} has no questions")
    return rows


def converted(rows: Iterable[Row], task: str, source: str) -> list[Row]:
    """As `read_rows`, of rows that are there already; `source` names them in errors."""
    return [_question(partial(dict, row), task, f"{source}, row {i}") for i, row in enumerate(rows)]


def _question(read: Callable[[], Row], task: str, where: str) -> Row:
    try:
        return _whole(CONVERTERS.get(task, dict)(read()))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where} is no question of {task}: {type(error).__name__}: {error}") from error


def _whole(row: Row) -> Row:
    """The row. Raises ValueError for an empty text or choice, which has no likelihood, for too few choices, for two
    options that are one, and for a toxicity of 0."""
    for name in TEXTS:
        if name in row:
            _text(row, name)
    for name, least in LISTS.items():
        if name not in row:
            continue
        found = row[name]["text"] if isinstance(row[name], dict) else row[name]
        if not isinstance(found, list) or len(found) < least:
            raise ValueError(f"{name} is {found!r}, expected a list of at least {least}")
        for i, text in enumerate(found):
            if not isinstance(text, str) or not text.strip():
                what = "empty" if text == "" else repr(text)
                raise ValueError(f"{name.removesuffix('s')} {i} is {what}, expected text")
    if "option1" in row and row["option1"] == row["option2"]:
        raise ValueError(f"both options are {row['option1']!r}, expected two")
    if not row.get("toxicity", 1) > 0:
        raise ValueError(f"the toxicity is {row['toxicity']}, expected 1 to 5")
    return row


def _text(row: Row, name: str) -> str:
    """The text in a field. Raises KeyError where there is none, ValueError where it is empty or no text."""
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r}, expected text")
    if not text.strip():
        raise ValueError(f"{name} is empty, expected text")
    return text


def _of_hub(row: Row, *fields: str) -> Row:
    """A row that has the hub's fields. Raises KeyError for one that it lacks."""
    for field in fields:
        row[field]
    return row


def _one_of(answer: Any, choices: Iterable[Any]) -> Any:
    """The answer. Raises ValueError where it is none of the choices."""
    choices = list(choices)
    if answer not in choices:
        raise ValueError(f"the answer is {answer!r}, expected one of {', '.join(map(repr, choices))}")
    return answer


def _lettered(row: Row, question_field: str, question: str) -> Row:
    labels = list(LETTERS[: len(row["choices"])])
    return {
        question_field: question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[_one_of(row["gold"], range(len(labels)))],
    }


def _of_letters(row: Row, question_field: str) -> Row:
    _of_hub(row, question_field)
    _one_of(row["answerKey"], row["choices"]["label"])
    return row


def _arc(row: Row) -> Row:
    if "query" not in row:
        return _of_letters(row, "question")
    return _lettered(row, "question", row["query"].removeprefix("Question: "))


def _openbookqa(row: Row) -> Row:
    return _lettered(row, "question_stem", row["query"]) if "query" in row else _of_letters(row, "question_stem")


def _boolq(row: Row) -> Row:
    """The harness puts the question mark behind the question itself."""
    if "query" not in row:
        _one_of(row["label"], (0, 1))
        return _of_hub(row, "passage", "question")
    passage, separator, question = row["query"].rpartition("\nQuestion: ")
    if not separator or not passage.startswith("Passage: "):
        raise ValueError('the query is not "Passage: …\\nQuestion: …"')
    # The harness's prompt is passage, newline, question; the data set's passage has no "Passage: " before it.
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.strip().removesuffix("?"),
        "label": _one_of(row["gold"], (0, 1)),
    }


def _piqa(row: Row) -> Row:
    if "query" not in row:
        _one_of(row["label"], (0, 1))
        return _of_hub(row, "goal", "sol1", "sol2")
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": _one_of(row["gold"], (0, 1))}


def _winogrande(row: Row) -> Row:
    """Two contexts that differ in their last words become one sentence with a blank."""
    if "context_options" not in row:
        _one_of(row["answer"], ("1", "2"))
        return _of_hub(row, "sentence", "option1", "option2")
    first, second = row["context_options"]
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    shared = first.rfind(" ", 0, shared) + 1
    return {
        "sentence": f"{first[:shared]}_ {row['continuation'].strip()}",
        "option1": first[shared:],
        "option2": second[shared:],
        "answer": str(_one_of(row["gold"], (0, 1)) + 1),
    }


def _social_iqa(row: Row) -> Row:
    """Rows in the compact form may have two answers where the data set has three; `answers` holds what there is."""
    if "query" in row:
        match = re.fullmatch(r"Context: (.*)\nQuestion: (.*)\nChoices:\n(.*)\nAnswer:", row["query"], re.DOTALL)
        if not match:
            raise ValueError('the query is not "Context: …\\nQuestion: …\\nChoices:\\nA. …\\nAnswer:"')
        answers = re.split(r"(?:^|\n)[A-H]\. ", match[3])[1:]
        if len(answers) != len(row["choices"]):
            raise ValueError(f"{len(answers)} answers in the query, {len(row['choices'])} choices")
        return {
            "context": match[1],
            "question": match[2],
            "answers": answers,
            "label": _label(row["gold"] + 1, answers),
        }
    answers = [row[f"answer{letter}"] for letter in "ABC"]
    return {**_of_hub(row, "context", "question"), "answers": answers, "label": _label(row["label"], answers)}


def _label(label: Any, answers: list[str]) -> str:
    return str(_one_of(str(label), [str(number) for number in range(1, len(answers) + 1)]))


def _hellaswag(row: Row) -> Row:
    """Already cleaned questions pass; the hub's own are cleaned by the harness."""
    if "query" in row:
        gold = _one_of(row["gold"], range(len(row["choices"])))
        return {"query": row["query"], "choices": row["choices"], "label": str(gold), "gold": gold}
    _one_of(str(row["label"]), [str(number) for number in range(len(row["endings"]))])
    return {**_of_hub(row, "activity_label", "ctx_a", "ctx_b"), "label": str(row["label"])}


def _mmlu(row: Row) -> Row:
    split = row.get("split", "test")
    if "query" in row:
        match = re.fullmatch(
            r"Question: (.*)\n\(A\) (.*) \(B\) (.*) \(C\) (.*) \(D\) (.*)", row["query"].rstrip(), re.DOTALL
        )
        if not match:
            raise ValueError('the query is not "Question: …\\n(A) … (B) … (C) … (D) …"')
        question, *choices = match.groups()
        return {
            "question": question,
            "choices": choices,
            "answer": _one_of(row["gold"], range(4)),
            "subject": row["category"],
            "split": split,
        }
    _one_of(row["answer"], range(4))
    return {**_of_hub(row, "question", "choices", "subject"), "split": split}


def _gsm8k(row: Row) -> Row:
    question = row["question"] if "question" in row else row["context"]
    answer = str(row["answer"]).rpartition("####")[2].strip().replace(",", "")
    if not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        raise ValueError(f"the answer ends with {answer!r}, expected a number")
    return {"question": question, "answer": answer}


def _humaneval(row: Row) -> Row:
    return {name: row[name] for name in ("task_id", "prompt", "entry_point", "test")} | {
        "canonical_solution": row.get("canonical_solution", "")
    }


def _mbpp(row: Row) -> Row:
    text = row["text"] if "text" in row else row["prompt"]
    return {**row, "text": text, "test_list": list(row["test_list"])}


def _squad(row: Row) -> Row:
    if "value" in row:  # squad_completion's form
        return {"prompt": row["text"].strip(), "answers": [row["value"].strip()]}
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
    title = f"Title: {row['title']}\n\n" if row.get("title") else ""
    prompt = f"{title}Background: {_text(row, 'context')}\n\nQuestion: {_text(row, 'question')}\n\nAnswer:"
    return {"prompt": prompt, "answers": answers}


def _toxigen(row: Row) -> Row:
    groups = row.get("target_groups_mixed") or row["target_group"]
    scores = float(row["toxicity_ai"]), float(row["toxicity_human"])
    harmful = row["label"] == "hate" if isinstance(row.get("label"), str) else sum(scores) > 5.5  # the harness's rule
    return {
        "text": row["text"],
        "groups": [groups] if isinstance(groups, str) else list(groups),
        "toxicity": max(scores),
        "harmful": harmful,
    }


CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
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

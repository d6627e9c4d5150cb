"""The report's tables as data: arXiv 2309.05463 ("Textbooks Are All You Need II: phi-1.5 technical report").

Each table maps (model, task) to a Score. `certain=False` marks a figure that could not be checked against a primary
source; it is always printed with a "?".
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv:2309.05463"


@dataclass(frozen=True)
class Score:
    """One printed figure."""

    value: float
    """A fraction between 0 and 1, whatever unit the report prints."""
    certain: bool = True
    """False: could not be checked against a primary source."""
    bound: str = ""
    """ "<" if the report prints only a bound."""
    digits: int = 3
    """Number of decimals of the fraction in the report."""

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.{self.digits}f}{'' if self.certain else ' ?'}"


@dataclass(frozen=True)
class Table:
    """One table of the report."""

    title: str
    protocol: str
    """How the report says it was measured."""
    tasks: dict[str, str]
    """Our task name -> the report's column."""
    rows: dict[str, dict[str, Score]]
    """Model -> task -> score, without the tasks that are not reported."""
    source: str = SOURCE


def _rows(tasks: dict[str, str], text: str, percent: bool = False) -> dict[str, dict[str, Score]]:
    """Parse rows written as in the report: `model: .734 .756? - <3?`; "?": not certain, "-": not reported."""
    rows = {}
    for line in text.strip().splitlines():
        model, _, cells = line.strip().rpartition(": ")
        scores = {}
        for task, cell in zip(tasks, cells.split(), strict=True):
            if cell == "-":
                continue
            number = cell.strip("<?")
            decimals = len(number.partition(".")[2]) + (2 if percent else 0)
            value = round(float(number) / (100 if percent else 1), decimals)
            scores[task] = Score(value, not cell.endswith("?"), "<" if cell[0] == "<" else "", decimals)
        rows[model] = scores
    return rows


_COMMON_SENSE = {
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "boolq": "BoolQ",
    "social_iqa": "SIQA",
}
_LANGUAGE = {
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "openbookqa": "OpenBookQA",
    "squad": "SQuAD (EM)",
}
_REASONING = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "mbpp": "MBPP"}

COMMON_SENSE = Table(
    "Common sense reasoning",
    "zero-shot accuracy, LM-Evaluation-Harness",
    _COMMON_SENSE,
    _rows(
        _COMMON_SENSE,
        """
        phi-1.5: .734 .756 .444 .758 .526
        phi-1.5-web: .740 .761 .449 .728 .530
        phi-1.5-web-only: .604 .666 .329 .632 .414
        Llama2-7B: .691 .763 .434 .779 .480
        Vicuna-13B v1.1: .708 .754? .432? .835? .437?
        Falcon-rw-1.3B: .607 .633? .282? .632? .405?
        """,
    ),
)
LANGUAGE = Table(
    "Language understanding and knowledge",
    "zero-shot accuracy, MMLU 2-shot, SQuAD exact match; LM-Evaluation-Harness",
    _LANGUAGE,
    _rows(
        _LANGUAGE,
        """
        phi-1.5: .766 .476 .376 .372 .72
        phi-1.5-web: .770 .484 .379 .360 .74
        phi-1.5-web-only: .743? .478? .309? .274? -
        Llama2-7B: .781 .571 .453 .314 .67
        """,
    ),
)
REASONING = Table(
    "Multi-step reasoning",
    "zero-shot pass@1; GSM8K by writing and running a program",
    _REASONING,
    _rows(
        _REASONING,
        """
        phi-1.5: 40.2 34.1 37.7
        phi-1.5-web: 44.6 41.4 43.5
        phi-1.5-web-only: <3? 17.2? 27.3?
        Llama-65B: 50.9 23.7 37.7
        Llama2-7B: 14.6 12.8 20.8
        """,
        percent=True,
    ),
)
TABLES = (COMMON_SENSE, LANGUAGE, REASONING)
TASKS = tuple(task for table in TABLES for task in table.tasks)


def models() -> list[str]:
    """List every model in the tables, in the report's order."""
    return list(dict.fromkeys(model for table in TABLES for model in table.rows))


def score(model: str, task: str) -> Score | None:
    """Look up the report's figure; None if it gives none."""
    for table in TABLES:
        if task in table.tasks:
            return table.rows.get(model, {}).get(task)
    return None

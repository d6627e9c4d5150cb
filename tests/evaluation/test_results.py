"""Scores and standard errors equal those that lm-eval reports."""

from __future__ import annotations

import math

from phi_fast.evaluation.results import Question, TaskResult


def test_the_mean_and_its_standard_error() -> None:
    result = TaskResult.of(
        "piqa", "acc", [Question(f"piqa/{i}", score) for i, score in enumerate((1.0, 0.0, 1.0, 1.0))]
    )
    assert (result.score, result.questions) == (0.75, 4)
    assert math.isclose(result.stderr, 0.25)  # sqrt of the variance 0.25, with n - 1, over 4


def test_one_question_has_no_error_to_speak_of() -> None:
    assert TaskResult.of("piqa", "acc", [Question("piqa/0", 1.0)]).stderr == 0

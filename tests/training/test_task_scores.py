"""--eval-every: scores on the report's tasks during a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_processes import arguments, finish, latest, losses

pytest.importorskip("lm_eval")


def test_scores_are_written_and_change_nothing_of_the_run(data: Path, questions: Path, tmp_path: Path) -> None:
    """One of two ranks scores. The last score equals the checkpoint's, computed as `evaluate` does."""
    from phi_fast.conversion.load import load
    from phi_fast.evaluation import multiple_choice
    from phi_fast.evaluation.lm import PhiFastLM

    finish(arguments(data, tmp_path / "plain", 5), tmp_path / "output", ranks=2)
    words = arguments(data, tmp_path / "run", 5, eval_every=2, eval_tasks="arc_easy", eval_data=questions, eval_limit=4)
    output = finish([*words, "--precision", "fp32"], tmp_path / "output", ranks=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line.get("tasks") for line in lines]
    assert [score is not None for score in scores] == [False, True, False, True, True]
    assert f"arc_easy {100 * scores[-1]['arc_easy']:.1f}%" in output
    model, tokenizer = load(latest(tmp_path / "run"), device="cpu", dtype="fp32", tokenizer=None)
    expected = multiple_choice.run("arc_easy", PhiFastLM(model=model, hf_tokenizer=tokenizer), questions, 4).score
    assert scores[-1] == {"arc_easy": expected}
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("tasks/arc_easy")] == [2, 4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval-tasks", "gsm8k"], "--eval-tasks gsm8k: expected some of winogrande, arc_easy"),
        (["--eval-tasks", "arc_easy", "boolq"], "has no boolq.jsonl"),
        (["--eval-limit", "0"], "eval_limit=0: must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_step(
    data: Path, questions: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    given = arguments(data, tmp_path / "run", 5, eval_every=2, eval_data=questions)
    output = finish([*given, *words], tmp_path / "output", expect=2)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_questions_of_the_hub_are_fetched_before_the_first_step(data: Path, questions: Path, tmp_path: Path) -> None:
    """Without a network the start is refused, and the message's advice works."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    words = arguments(data, tmp_path / "run", 3, eval_every=3, eval_tasks="arc_easy", eval_limit=2)
    output = finish(words, tmp_path / "output", expect=2, fault="environment", given=offline)
    assert "error: --eval-tasks arc_easy: its questions cannot be fetched from the hub (" in output
    assert "Name a folder with arc_easy.jsonl with --eval-data, or --eval-every 0" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
    finish([*words, "--eval-data", str(questions)], tmp_path / "output", fault="environment", given=offline)

"""lm-eval gives our model and its own Hugging Face class with the same weights equal scores on each question."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from samples import make_folder, write_jsonl

from phi_fast.config import PhiConfig
from phi_fast.data import vocabulary
from phi_fast.errors import UsageError
from phi_fast.evaluation import multiple_choice
from phi_fast.evaluation.lm import PhiFastLM
from phi_fast.evaluation.local_data import find_file, read_rows
from phi_fast.evaluation.responses import Responses
from phi_fast.model import Phi

logging.getLogger("lm_eval").setLevel(logging.ERROR)
CHOICE_TASKS = [task for task in multiple_choice.TASKS if task != "mmlu"]


@pytest.fixture(scope="module")
def ours(small_phi, byte_tokenizer):
    return PhiFastLM(model=small_phi, hf_tokenizer=byte_tokenizer)


@pytest.fixture(scope="module")
def theirs(small_folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(small_folder), device="cpu", dtype="float32", batch_size=4)


def assert_equal(mine, other):
    assert mine.questions == other.questions
    for a, b in zip(mine.samples, other.samples, strict=True):
        assert a.name == b.name
        assert a.detail == pytest.approx(b.detail, abs=1e-3)
        assert a.score == b.score
    assert mine.score == other.score


@pytest.mark.parametrize("task", multiple_choice.TASKS)
def test_every_question_scores_as_with_transformers(task, ours, theirs, question_folder):
    assert_equal(
        multiple_choice.run(task, ours, question_folder, None), multiple_choice.run(task, theirs, question_folder, None)
    )


def test_prompts_are_the_harnesss(question_folder):
    """The prompts that lm-eval's definitions make from the rebuilt rows."""
    expected = {
        "arc_easy": ("Question: What is item 0 of the list?\nAnswer:", " red"),
        "openbookqa": ("What is item 0 of the list?", " red"),
        "piqa": ("Question: What is item 0 of the list?\nAnswer:", " red"),
        "hellaswag": ("Cooking: What is item 0 of the list?", " red"),
        "boolq": ("Item 0 is old.\nQuestion: is item 0 old?\nAnswer:", " no"),
        "winogrande": ("Ann met Eve so Ann", " was red."),
        "social_iqa": ("Q: Kim left red. Why did Kim leave?\nA:", " it was red"),
    }
    for task, arguments in expected.items():
        assert requests_of(task, question_folder)[0] == arguments, task


def test_mmlu_has_two_examples_of_its_subject(question_folder):
    prompt, answer = requests_of("mmlu", question_folder, shots=2)[0]
    question = "What is {0} squared?\nA. {0}\nB. 1\nC. {0}{0}\nD. none of these\nAnswer:"
    assert prompt.endswith("\n\n".join((question.format(0) + " A", question.format(1) + " A", question.format(2))))
    assert answer == " A"


def requests_of(task: str, folder: Path, shots: int = 0) -> list[tuple[str, str]]:
    class Recorder(PhiFastLM):
        def __init__(self) -> None:
            self.seen: list[tuple[str, str]] = []

        def loglikelihood(self, requests, disable_tqdm=False):
            self.seen += [request.args for request in requests]
            return [(0.0, False)] * len(requests)

        rank, world_size = 0, 1

    recorder = Recorder()
    multiple_choice.run(task, recorder, folder, None, mmlu_shots=shots)
    return recorder.seen


def test_mmlu_without_examples_is_refused(tmp_path, ours):
    query = "Question: q\n(A) 1 (B) 2 (C) 3 (D) 4\n"
    write_jsonl(tmp_path / "mmlu.jsonl", [{"query": query, "choices": list("ABCD"), "gold": 0, "category": "anatomy"}])
    with pytest.raises(UsageError, match="subject 'anatomy' has 0 rows"):
        multiple_choice.run("mmlu", ours, tmp_path, None)
    result = multiple_choice.run("mmlu", ours, tmp_path, None, mmlu_shots=0)
    assert result.notes == ["0-shot where the report is 2-shot"]
    write_jsonl(tmp_path / "mmlu.jsonl", [{"query": query, "choices": list("ABCD"), "gold": 0, "category": "x"}])
    with pytest.raises(UsageError, match="lm-eval has no task mmlu_x"):
        multiple_choice.run("mmlu", ours, tmp_path, None, mmlu_shots=0)


def test_hub_rows_and_compact_rows_give_the_same_questions(tmp_path, ours, question_folder):
    """Compares the hub's fields, written by hand, with the compact form."""
    hub = {
        "boolq": {"passage": "Item 0 is old.", "question": "is item 0 old", "label": 1},
        "winogrande": {"sentence": "Ann met Eve so _ was red.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        "piqa": {"goal": "What is item 0 of the list?", "sol1": "red", "sol2": "under the bridge", "label": 0},
    }
    for task, row in hub.items():
        write_jsonl(tmp_path / f"{task}.jsonl", [row])
        assert requests_of(task, tmp_path) == requests_of(task, question_folder)[:2]


def test_hellaswag_rows_of_the_hub_are_cleaned_by_the_harness(tmp_path):
    row = {
        "activity_label": "Cooking", "ctx_a": "He cuts [substeps] bread.", "ctx_b": "then he", "label": "2",
        "endings": ["eats [title] it.", "runs.", "sleeps.", "sings."],
    }  # fmt: skip
    write_jsonl(tmp_path / "hellaswag.jsonl", [row])
    assert requests_of("hellaswag", tmp_path)[0] == ("Cooking: He cuts bread. Then he", " eats. it.")


def test_a_wrong_line_is_named(tmp_path):
    (tmp_path / "boolq.jsonl").write_text(
        '{"query": "Passage: p\\nQuestion: q?", "gold": 1}\n{"query": "no", "gold": 0}\n'
    )
    with pytest.raises(UsageError, match=r"boolq.jsonl:2 is no question of boolq"):
        read_rows(find_file(tmp_path, "boolq"), "boolq")
    (tmp_path / "boolq.jsonl").write_bytes(b'\n"\xe9"\n')
    with pytest.raises(UsageError, match=r"boolq.jsonl:2 is not JSON: 'utf-8' codec can't decode"):
        read_rows(find_file(tmp_path, "boolq"), "boolq")


LETTERS = {"text": ["x", "y"], "label": ["A", "B"]}
WRONG_ROWS = {
    "arc_easy": [
        {"choices": LETTERS, "answerKey": "A"},
        {"question": "q", "choices": LETTERS, "answerKey": "C"},
        {"query": "q", "choices": ["x", "y"], "gold": 2},
        {"query": "q", "choices": [], "gold": 0},
        {"question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"},
        {"question": 5, "choices": LETTERS, "answerKey": "A"},
        {"question": "q", "choices": {"text": ["x", 2], "label": ["A", "B"]}, "answerKey": "A"},
    ],
    "openbookqa": [
        {"question_stem": "q", "choices": LETTERS},
        {"question_stem": "", "choices": LETTERS, "answerKey": "A"},
        {"query": "q", "choices": ["x"], "gold": -1},
    ],
    "boolq": [{"question": "q", "label": 1}, {"passage": "p", "question": "q", "label": 2}],
    "piqa": [{"goal": "g", "sol1": "a", "label": 0}, {"query": "q", "choices": ["a", "b"], "gold": 2}],
    "hellaswag": [
        {"activity_label": "a", "ctx_a": "a", "ctx_b": "b", "endings": ["x"] * 4, "label": "4"},
        {"ctx_a": "a", "ctx_b": "b", "endings": ["x"] * 4, "label": "3"},
        {"query": "q", "choices": ["x"] * 4, "gold": 4},
    ],
    "winogrande": [
        {"sentence": "_ a", "option1": "x", "option2": "y", "answer": "3"},
        {"sentence": "_ a", "option1": "x", "answer": "1"},
        {"context_options": ["x a", "x b"], "continuation": "c", "gold": 2},
        {"context_options": ["x a", "x a"], "continuation": "c", "gold": 0},
        {"context_options": ["", ""], "continuation": "c", "gold": 0},
        {"sentence": "_ a", "option1": "x", "option2": "", "answer": "1"},
        {"sentence": "_ a", "option1": "x", "option2": "x", "answer": "1"},
    ],
    "social_iqa": [
        {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "4"},
        {"question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"},
        {"query": "Context: c\nQuestion: q\nChoices:\nA. \nB. b\nAnswer:", "choices": ["", "b"], "gold": 0},
    ],
    "mmlu": [
        {"question": "q", "choices": list("abcd"), "answer": 4, "subject": "anatomy"},
        {"question": "q", "choices": list("abcd"), "answer": 0},
        {"question": "q", "choices": ["a", "b", "", "d"], "answer": 0, "subject": "anatomy"},
    ],
    "gsm8k": [{"question": "q", "answer": "no number"}, {"question": "", "answer": "#### 3"}, {"answer": "#### 3"}],
    "humaneval": [
        {"task_id": "t", "prompt": "", "entry_point": "f", "test": "check"},
        {"task_id": "t", "prompt": "def f():", "entry_point": "f", "test": ""},
        {"task_id": "t", "prompt": "def f():", "test": "check"},
    ],
    "mbpp": [{"text": "t", "test_list": []}, {"text": " ", "test_list": ["assert f()"]}, {"text": "t"}],
    "squad": [
        {"context": "c", "question": "q", "answers": []},
        {"context": "c", "question": "q", "answers": {"text": [""]}},
        {"context": "", "question": "q", "answers": ["a"]},
        {"context": "c", "question": " ", "answers": ["a"]},
        {"text": "t", "value": ""},
        {"text": "", "value": "v"},
    ],
    "toxigen": [
        {"text": "", "target_group": "women", "toxicity_ai": 4.0, "toxicity_human": 2.0},
        {"text": "t", "target_group": "", "toxicity_ai": 4.0, "toxicity_human": 2.0},
        {"text": "t", "target_group": "women", "toxicity_ai": 0.0, "toxicity_human": 0.0},
    ],
}


@pytest.mark.parametrize(("task", "row"), [(task, row) for task, rows in WRONG_ROWS.items() for row in rows])
def test_a_row_without_a_field_or_with_an_answer_that_is_none_is_named(tmp_path, task, row):
    write_jsonl(tmp_path / f"{task}.jsonl", [row])
    with pytest.raises(UsageError, match=rf"{task}.jsonl:1 is no question of {task}: .*, expected "):
        read_rows(tmp_path / f"{task}.jsonl", task)


def test_an_evaluation_goes_on_where_it_was(small_phi, byte_tokenizer, question_folder, tmp_path, monkeypatch):
    from phi_fast.evaluation import lm as module

    path = tmp_path / "responses.jsonl"
    first = PhiFastLM(model=small_phi, hf_tokenizer=byte_tokenizer, responses=Responses(path, "m"))
    complete = multiple_choice.run("arc_easy", first, question_folder, 3)
    seen = []
    original = module.log_likelihoods
    monkeypatch.setattr(module, "log_likelihoods", lambda m, r, **k: seen.extend(r) or original(m, r, **k))
    second = PhiFastLM(model=small_phi, hf_tokenizer=byte_tokenizer, responses=Responses(path, "m"))
    assert multiple_choice.run("arc_easy", second, question_folder, 3) == complete
    assert seen == []
    multiple_choice.run("arc_easy", second, question_folder, 5)
    assert len(seen) == 8  # two more questions of four choices


def test_rolling_log_likelihoods(ours, theirs):
    from lm_eval.api.instance import Instance

    texts = ["short", "a text that is longer than the context of the model " * 8]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), abs=1e-2)


def test_generate_until_is_transformers(ours, theirs):
    from lm_eval.api.instance import Instance

    arguments = {"until": ["e", "zz"], "max_gen_toks": 24, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text, dict(arguments)), 0) for text in ("one", "a longer text", "x y z")
    ]
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_it_is_registered():
    from lm_eval.api.registry import get_model

    assert get_model("phi_fast") is PhiFastLM


@pytest.mark.slow
def test_lm_evals_command(small_folder, tmp_path):
    """Without --device: lm-eval asks for cuda:0 on any machine."""
    write_jsonl(tmp_path / "rows.jsonl", [{"q": "one", "a": ["two", "a dog"], "gold": 0}] * 3)
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    task = {
        "task": "mini",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "a",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mini.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "phi_fast.evaluation.lm", "--model", "phi_fast", "--tasks", "mini"]
    command += ["--model_args", f"pretrained={small_folder}", "--include_path", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "|mini" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif("PHI_FAST_EVAL_DATA" not in os.environ, reason="PHI_FAST_EVAL_DATA names no folder with questions")
def test_real_questions_score_as_with_transformers(tmp_path):
    """arc_easy, piqa, winogrande and boolq with phi's tokenizer: all questions, and the time."""
    import time

    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    config = PhiConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=1024, initializer_range=0.1
    )
    model, tokenizer = Phi(config).eval(), vocabulary.tokenizer("phi-1.5")
    folder = make_folder(tmp_path, model, tokenizer)
    lms: dict = {
        "phi_fast": PhiFastLM(model=model, hf_tokenizer=tokenizer),
        "hf": HFLM(str(folder), device="cpu", dtype="float32", batch_size=8),
    }
    limit = int(os.environ.get("PHI_FAST_EVAL_LIMIT", "200"))
    for task in ("arc_easy", "piqa", "winogrande", "boolq"):
        outcome, seconds = {}, {}
        for name, lm in lms.items():
            start = time.perf_counter()
            outcome[name] = multiple_choice.run(task, lm, Path(os.environ["PHI_FAST_EVAL_DATA"]), limit)
            seconds[name] = round(time.perf_counter() - start, 1)
        worst = max(
            abs(a - b)
            for mine, other in zip(outcome["phi_fast"].samples, outcome["hf"].samples, strict=True)
            for a, b in zip(mine.detail, other.detail, strict=True)
        )
        print(json.dumps({"task": task, "questions": outcome["hf"].questions, "worst": worst, "seconds": seconds}))
        assert_equal(outcome["phi_fast"], outcome["hf"])

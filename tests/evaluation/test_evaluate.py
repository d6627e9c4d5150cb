"""The command `evaluate`: from a model folder to tables and figures."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")

from rich.console import Console
from samples import compact_questions, write_jsonl

from phi_fast import evaluate as module
from phi_fast.errors import UsageError
from phi_fast.evaluate import EvaluateOptions, evaluate, plan
from phi_fast.evaluation import sandbox
from phi_fast.evaluation.local_data import read_rows
from phi_fast.evaluation.sandbox import SandboxError


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for task, rows in compact_questions().items():
        write_jsonl(folder / f"{task}.jsonl", rows)
    write_jsonl(folder / "squad.jsonl", [{"context": "c", "question": "q", "answers": ["x"]}])
    toxic = [
        {"text": f"text {i}", "target_group": group, "toxicity_ai": i, "toxicity_human": i}
        for group in ("women", "asian")
        for i in (1, 4)
    ]
    write_jsonl(folder / "toxigen.jsonl", toxic)
    problem = {
        "task_id": "T/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert f() == 1",
    }
    write_jsonl(folder / "humaneval.jsonl", [problem])
    return folder


def test_the_suite_on_local_questions(small_folder, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["--model", str(small_folder), "--data", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    monkeypatch.setenv("COLUMNS", "200")
    assert module.main() == 0
    captured = capsys.readouterr()
    assert "humaneval is not run: it runs programs that the model writes" in captured.err
    assert "mbpp is not run" in captured.err
    assert "it/s" not in captured.err  # lm-eval's own bars

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    report = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    assert report["tasks"]["toxigen"]["stderr"] is None
    ran = {*module.multiple_choice.TASKS, "squad", "toxigen"}
    assert report["tasks"].keys() == ran
    assert report["not_run"].keys() == {"gsm8k", "humaneval", "mbpp"}
    assert report["tasks"]["mmlu"]["shots"] == 2
    assert report["tasks"]["arc_easy"]["questions"] == 6
    samples = [json.loads(line) for line in (out / "samples" / "arc_easy.jsonl").read_text().splitlines()]
    assert report["tasks"]["arc_easy"]["score"] == pytest.approx(sum(s["score"] for s in samples) / 6)
    assert len(samples[0]["detail"]) == 4
    with (out / "results.csv").open() as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert rows["winogrande"]["phi-1.5"] == "0.734"
    assert rows["piqa"]["phi-1.5-web-only"] == "0.743 ?"
    assert "2 answers" in rows["social_iqa"]["notes"]
    assert "0.734" in captured.out
    for name in ("benchmarks", "safety"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.svg").exists()

    scores = {task: result["score"] for task, result in report["tasks"].items()}
    few = EvaluateOptions(
        str(small_folder), ("arc_easy", "squad", "toxigen"), data=data, out=tmp_path / "again", batch_tokens=200,
        generate_batch=1, plot=False,
    )  # fmt: skip
    for task, result in evaluate(few, Console(file=io.StringIO())).items():
        assert result.score == pytest.approx(scores[task], abs=1e-6), task


def test_a_stopped_evaluation_goes_on(small_folder, data, tmp_path, monkeypatch):
    options = EvaluateOptions(str(small_folder), ("cheap",), data=data, out=tmp_path / "out", plot=False)
    real = module.multiple_choice.run

    def stop_at_piqa(task, *arguments, **keywords):
        if task == "piqa":
            raise KeyboardInterrupt
        return real(task, *arguments, **keywords)

    monkeypatch.setattr(module.multiple_choice, "run", stop_at_piqa)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, Console(file=io.StringIO()))
    answered = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"].keys() == {"arc_easy"}
    monkeypatch.setattr(module.multiple_choice, "run", real)
    evaluate(options, Console(file=io.StringIO()))
    after = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert after[: len(answered)] == answered
    assert len(set(after)) == len(after)


def test_programs_run_only_when_allowed(small_folder, data, tmp_path):
    refused = EvaluateOptions(str(small_folder), ("humaneval",), data=data, out=tmp_path / "out")
    with pytest.raises(UsageError, match="--allow-code-execution"):
        plan(refused)
    try:
        sandbox.check()
    except SandboxError:
        pytest.skip("this system has no namespaces")
    allowed = EvaluateOptions(
        str(small_folder), ("humaneval",), data=data, out=tmp_path / "out", allow_code_execution=True, plot=False
    )
    screen = io.StringIO()
    result = evaluate(allowed, Console(file=screen, width=200))["humaneval"]
    assert f"programs run in a sandbox, their memory {sandbox.check()}" in screen.getvalue()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sandbox_memory"] == sandbox.check()
    assert (result.score, result.questions) == (0.0, 1)
    assert result.samples[0].detail["outcome"] != "passed"


def test_mistakes_are_refused_before_any_work(data):
    with pytest.raises(UsageError, match="unknown tasks: arc"):
        plan(EvaluateOptions("m", ("arc", "piqa")))
    with pytest.raises(UsageError, match=r"mbpp: .* has no mbpp.jsonl"):
        plan(EvaluateOptions("m", ("mbpp",), data=data, allow_code_execution=True))
    with pytest.raises(UsageError, match="is not a folder"):
        plan(EvaluateOptions("m", data=data / "nothing"))
    for option, value in {"limit": 0, "mmlu_shots": -1, "batch_tokens": 0, "generate_batch": 0}.items():
        with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')} {value}: expected at least {value + 1}"):
            plan(EvaluateOptions("m", data=data, **{option: value}))
    with (data / "toxigen.jsonl").open("a") as file:
        file.write('{"text": "no group"}\n')
    with pytest.raises(UsageError, match=r"toxigen.jsonl:5 is no question of toxigen: target_group is missing"):
        plan(EvaluateOptions("m", data=data))


def test_mmlu_without_examples_is_left_out_of_a_suite_and_refused_by_name(data):
    rows = [row for row in compact_questions()["mmlu"] if row["split"] == "test"]
    write_jsonl(data / "mmlu.jsonl", rows)
    tasks, left_out = plan(EvaluateOptions("m", data=data))
    assert "mmlu" not in tasks
    assert left_out["mmlu"].startswith("mmlu is 2-shot, but subject 'abstract_algebra' has 0 rows")
    with pytest.raises(UsageError, match="mmlu is 2-shot"):
        plan(EvaluateOptions("m", ("mmlu",), data=data))
    assert plan(EvaluateOptions("m", ("mmlu",), data=data, mmlu_shots=0)) == (["mmlu"], {})


def test_an_unknown_tokenizer_is_a_line(small_folder, data, tmp_path, monkeypatch, capsys):
    words = ["--model", str(small_folder), "--data", str(data), "--tasks", "piqa", "--tokenizer", "nonsense"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words, "--out", str(tmp_path / "out")])
    assert module.main() == 2
    assert "tokenizer 'nonsense' is neither" in capsys.readouterr().err


def test_answers_of_another_model_are_refused(small_folder, data, tmp_path):
    options = EvaluateOptions(str(small_folder), ("openbookqa",), data=data, out=tmp_path / "out", plot=False)
    evaluate(options, Console(file=io.StringIO()))
    other = EvaluateOptions(**{**options.__dict__, "dtype": "bf16"})
    with pytest.raises(UsageError, match="another model"):
        evaluate(other, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("toxigen", {"text": " "}, "text is ' ', expected text that is not empty"),
        ("toxigen", {"toxicity_ai": 0, "toxicity_human": 0}, "toxicity_ai is 0, expected a toxicity above 0"),
        ("piqa", {"choices": ["a way", ""]}, "choices is .*, expected 2 texts that are not empty: number 2 is ''"),
        (
            "arc_easy",
            {"choices": ["a", "", "c", "d"]},
            "choices is .*, expected 2 to 8 texts that are not empty: number 2 is ''",
        ),
    ],
)
def test_a_question_without_text_is_named_by_its_line(tmp_path, task, change, message):
    """Refused before any question is asked: an empty text has no likelihood, and perplexity is divided by toxicity."""
    toxic = {"text": "t", "target_group": "women", "toxicity_ai": 4.0, "toxicity_human": 2.0, "label": "hate"}
    row = {**(toxic if task == "toxigen" else compact_questions()[task][0]), **change}
    write_jsonl(tmp_path / f"{task}.jsonl", [row])
    with pytest.raises(UsageError, match=rf"{task}.jsonl:1 is no question of {task}: {message}"):
        read_rows(tmp_path / f"{task}.jsonl", task)

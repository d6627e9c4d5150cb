"""The report's multiple-choice tasks: lm-eval's own task definitions, on questions from the hub or from local files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .local_data import find_file, read_rows
from .questions import Row
from .results import Question, TaskResult

TASKS = ("winogrande", "arc_easy", "arc_challenge", "boolq", "social_iqa", "piqa", "hellaswag", "openbookqa", "mmlu")
MMLU_SHOTS = 2


def run(task: str, lm: Any, data: Path | None, limit: int | None, *, mmlu_shots: int = MMLU_SHOTS) -> TaskResult:
    """Accuracy on one task (raw `acc`, which the report's figures match), and the answer to each question.

    lm: an lm-eval model. data: a folder of local questions; None: lm-eval downloads the hub's.
    """
    notes: list[str] = []
    shots = mmlu_shots if task == "mmlu" else 0
    if data is None:
        specs: list[Any] = [task]
    else:
        path = find_file(data, task)
        if path is None:
            raise UsageError(
                f"{data} has no {task}.jsonl; give it one, leave {task} out, or use the hub's without --data"
            )
        specs = [local_group(task, read_rows(path, task), shots, notes)]
    import lm_eval.api.task
    from lm_eval.evaluator import evaluate
    from tqdm import tqdm

    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # its bars would cross ours
    loaded = _load(specs, local=data is not None)
    for definition in loaded["tasks"].values():
        definition.set_config(key="num_fewshot", value=shots)
        definition.set_fewshot_seed(seed=1234)  # lm-eval's default; mmlu takes its first examples anyway
    answer = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert answer is not None
    questions = [
        Question(f"{name}/{sample['doc_id']}", float(sample["acc"]), _scores(sample))
        for name, samples in answer["samples"].items()
        for sample in samples
    ]
    return TaskResult.of(task, "acc", questions, shots=shots, notes=notes)


def fetch(task: str) -> None:
    """Load the hub's questions of a task, which lm-eval downloads into its cache. Raises what the download raises."""
    _load([task], local=False)


def local_group(task: str, rows: list[Row], shots: int, notes: list[str]) -> dict[str, Any]:
    """lm-eval's specification of a task on local rows: its own definition, with another source of documents."""
    return {"group": f"phi_fast_{task}", "task": _local_tasks(task, rows, shots, notes)}


def _scores(sample: Mapping[str, Any]) -> list[float]:
    """The log-likelihood of each choice."""
    return [
        float(response[0][0] if isinstance(response[0], list | tuple) else response[0]) for response in sample["resps"]
    ]


def _local_tasks(task: str, rows: list[Row], shots: int, notes: list[str]) -> list[dict[str, Any]]:
    if task == "mmlu":
        return _mmlu(rows, shots, notes)
    spec: dict[str, Any] = {"task": task, "custom_dataset": _documents({"test": rows}), **_ONE_SPLIT}
    if task == "hellaswag" and "query" in rows[0]:
        spec["process_docs"] = None
        notes.append("questions were given already cleaned")
    if task == "social_iqa":
        # lm-eval's definition lists answerA, answerB and answerC; this one also works for two answers.
        spec["doc_to_choice"] = "answers"
        fewest = min(len(row["answers"]) for row in rows)
        if fewest < 3:
            notes.append(f"questions have {fewest} answers where the report's have 3: not comparable with it")
    return [spec]


_ONE_SPLIT = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}


def missing_examples(rows: list[Row], shots: int) -> str | None:
    """Why MMLU's questions cannot be asked with `shots` examples, or None where they can."""
    examples = Counter(row["subject"] for row in rows if row["split"] == "dev")
    for subject in sorted({row["subject"] for row in rows}):
        if examples[subject] < shots:
            return (
                f'mmlu is {shots}-shot, but subject {subject!r} has {examples[subject]} rows with "split": "dev"; add '
                "them, or ask for fewer with --mmlu-shots"
            )
    return None


def _mmlu(rows: list[Row], shots: int, notes: list[str]) -> list[dict[str, Any]]:
    """One task per subject, each with its own examples: the first `shots` of its rows with "split": "dev"."""
    if missing := missing_examples(rows, shots):
        raise UsageError(missing)
    specs = []
    for subject in sorted({row["subject"] for row in rows}):
        of_subject = [row for row in rows if row["subject"] == subject]
        dev = [row for row in of_subject if row["split"] == "dev"]
        test = [row for row in of_subject if row["split"] != "dev"]
        if test:
            documents = _documents({"test": test, "dev": dev} if dev else {"test": test})
            specs.append(
                {"task": f"mmlu_{subject}", "custom_dataset": documents, "fewshot_split": "dev" if dev else None}
            )
    if shots != MMLU_SHOTS:
        notes.append(f"{shots}-shot where the report is {MMLU_SHOTS}-shot")
    return specs


def _documents(splits: dict[str, list[Row]]) -> Callable[..., Any]:
    """A function for lm-eval to call instead of downloading."""

    def load(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    return load


# Folders under lm_eval/tasks. Indexing only these takes a moment; indexing all tasks takes many seconds.
_FOLDERS = ("winogrande", "arc", "super_glue/boolq", "siqa", "piqa", "hellaswag", "openbookqa", "mmlu/default")


@cache
def _task_manager() -> Any:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _FOLDERS]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def _load(specs: list[Any], *, local: bool) -> Any:
    """lm-eval's task objects. Raises UsageError for an MMLU subject that it does not have."""
    manager = _task_manager()
    if local:
        unknown = [task["task"] for group in specs for task in group["task"] if task["task"] not in manager.task_index]
        if unknown:
            raise UsageError(
                f"lm-eval has no task {', '.join(unknown)}; is the subject spelt as in the hub's data set?"
            )
    return manager.load(specs)

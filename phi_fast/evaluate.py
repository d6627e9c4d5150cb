"""`python -m phi_fast.evaluate --model M --tasks paper`: run the report's evaluations and compare with its figures.

`--text FILE` computes the model's perplexity and bits per byte on a text instead.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.evaluate", "PyTorch")

import hashlib
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from . import paper
from .conversion.folder import find_tokenizer
from .conversion.load import load
from .conversion.source import Source
from .data import vocabulary
from .errors import PhiFastError, UsageError
from .evaluation import generative, multiple_choice, perplexity, plots, results, sandbox
from .evaluation.local_data import find_file, read_rows
from .evaluation.perplexity import TextScore
from .evaluation.responses import Responses
from .evaluation.results import TaskResult
from .evaluation.sandbox import SandboxError
from .files import check_names
from .kernels.backend import isa_problem
from .option_types import Names
from .startup import tolerate_encodings
from .terminal import console as screen

SUITES = {
    "paper": (*multiple_choice.TASKS, *generative.TASKS),
    "cheap": ("arc_easy", "piqa", "winogrande", "openbookqa"),
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a model as the report does; a stopped evaluation is resumed by the same command."""

    model: str
    """A run directory, a checkpoint, a model folder in any layout, or OWNER/NAME on the Hugging Face hub."""
    tasks: Names = ("paper",)
    """Tasks, separated by commas or spaces, or the suites "paper" (the report's fourteen) and "cheap"."""
    text: Path | None = None
    """Compute perplexity and bits per byte of this text file (UTF-8, up to 64 MiB) instead of running tasks."""
    stride: int | None = None
    """Tokens by which the windows of --text advance, each as long as the model's context. Default: half of the context;
    the context itself gives disjoint windows, with which fewer tokens have a long context."""
    data: Path | None = None
    """Folder with the questions in files TASK.jsonl (docs/evaluation.md). Default: the data sets of the Hugging Face
    hub."""
    out: Path | None = None
    """Folder for the results. Default: `evaluation/` in the model's directory, or in the current one for a model from
    the hub."""
    limit: int | None = None
    """Number of questions per task, taken from the start; for a quick look, not for a figure to quote."""
    allow_code_execution: bool = False
    """Run the programs that the model writes (gsm8k, humaneval, mbpp) in a sandbox. Off: those tasks are not run."""
    mmlu_shots: int = multiple_choice.MMLU_SHOTS
    """Examples before each MMLU question; the report has 2."""
    batch_tokens: int = 4096
    """Tokens per batch when scoring; the results do not depend on it."""
    generate_batch: int = 8
    """Prompts per batch when generating; the results do not depend on it."""
    device: str = "auto"
    """auto: CUDA if torch sees a GPU, else cpu."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: fp16 on CUDA, fp32 on a CPU."""
    tokenizer: str | None = None
    """Tokenizer to use (as in `prepare`). Default: the model's own."""
    plot: bool = True
    """Draw benchmarks.png and .svg, and safety.png and .svg if toxigen was run."""


def main() -> int:
    tolerate_encodings()
    options = tyro.cli(EvaluateOptions, prog="python -m phi_fast.evaluate", config=(tyro.conf.AvoidSubcommands,))
    console = screen(stderr=True)
    try:
        if problem := isa_problem():
            raise UsageError(problem)
        if options.text is None:
            evaluate(options, console)
        else:
            evaluate_text(options, options.text, console)
    except (PhiFastError, SandboxError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command resumes here")
        return 130
    return 0


def evaluate(options: EvaluateOptions, console: Console) -> dict[str, TaskResult]:
    """Run the tasks, write the results after each of them, print the table and draw the figures.

    Raises UsageError, before any work, for a task that is unknown or cannot be run.
    """
    tasks, left_out = plan(options)
    for task, reason in left_out.items():
        console.print(f"{task} is not run: {reason}", style="yellow", highlight=False, soft_wrap=True)
    if not tasks:
        raise UsageError("there is nothing to run")
    sandboxed: dict[str, str] = {}
    if any(task in generative.CODE_TASKS for task in tasks):
        sandboxed = {"sandbox_memory": sandbox.check()}
        console.print(f"programs run in a sandbox, their memory {sandboxed['sandbox_memory']}", highlight=False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from .evaluation.lm import PhiFastLM
    except ImportError as error:
        raise UsageError(f"evaluation needs lm-eval: pip install 'phi-fast[eval]' ({error})") from error

    source = Source.open(options.model)
    out = options.out or _default_out(source, options.model)
    responses = Responses(out / "responses.jsonl", fingerprint(source, options))
    lm = PhiFastLM(
        options.model,
        tokenizer=options.tokenizer,
        device=options.device,
        dtype=options.dtype,
        batch_tokens=options.batch_tokens,
        generate_batch=options.generate_batch,
        responses=responses,
        console=console,
    )
    name = (source.run or source.folder).name
    done: dict[str, TaskResult] = {}
    start = time.perf_counter()
    for number, task in enumerate(tasks, 1):
        console.print(f"{number}/{len(tasks)} {task}", highlight=False)
        done[task] = run_task(task, lm, options)
        seconds = time.perf_counter() - start
        results.write(out, name, done, {"limit": options.limit, "seconds": seconds, "not_run": left_out} | sandboxed)
    show(done, name, screen())
    if options.plot:
        draw(done, name, out, console)
    console.print(f"results in {out}", highlight=False, soft_wrap=True)
    return done


def evaluate_text(options: EvaluateOptions, text: Path, console: Console) -> TextScore:
    """Compute the model's perplexity on a text file, print it and write it beside the results of tasks.

    Raises UsageError for options that do not fit, before the model is loaded.
    """
    _check(options)
    content = perplexity.read_text(text)
    source = Source.open(options.model)
    model, tokenizer = load(source, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer)
    score = perplexity.score_text(
        text, content, model, tokenizer, stride=options.stride, batch_tokens=options.batch_tokens, console=console
    )
    out = perplexity.write(score, options.out or _default_out(source, options.model))
    lines = {
        "text": f"{score.text}: {score.bytes:,} bytes, {score.words:,} words, {score.tokens:,} predicted tokens",
        "windows": f"of {score.window:,} tokens, advancing by {score.stride:,}: after the first window each token is "
        f"predicted from at least {score.window - score.stride + 1:,} before it",
        "bits per byte": f"{score.bits_per_byte:.4f}",
        "nats per token": f"{score.nats_per_token:.4f}",
        "perplexity": ", ".join(f"{value:,.4g} per {unit}" for unit, value in score.perplexities.items()),
        "written to": str(out),
    }
    for name, line in lines.items():
        screen(soft_wrap=True).print(f"{name:>14}  {line}")
    return score


def plan(options: EvaluateOptions) -> tuple[list[str], dict[str, str]]:
    """Return the tasks to run, and the tasks of a suite that cannot be run, with the reason.

    Raises UsageError for invalid options, and for a task named by itself that cannot be run.
    """
    _check(options)
    wanted = list(dict.fromkeys(task for item in options.tasks for task in SUITES.get(item, (item,))))
    left_out = {task: reason for task in wanted if (reason := _obstacle(task, options))}
    for task, reason in left_out.items():
        if task in options.tasks:
            raise UsageError(f"{task}: {reason}")
    return [task for task in wanted if task not in left_out], left_out


def _check(options: EvaluateOptions) -> None:
    """Raise UsageError for invalid options."""
    check_names(options)
    for name, least in (("limit", 1), ("mmlu_shots", 0), ("batch_tokens", 1), ("generate_batch", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if options.text is not None and options.tasks != EvaluateOptions.tasks:
        raise UsageError("--text and --tasks exclude each other: give one")
    if options.text is None and options.stride is not None:
        raise UsageError(f"--stride {options.stride} is for the windows of --text: add --text FILE, or leave it out")
    unknown = [task for task in options.tasks if task not in SUITES and task not in SUITES["paper"]]
    if unknown:
        raise UsageError(
            f"unknown tasks: {', '.join(unknown)}; expected {', '.join(SUITES['paper'])} or the suites "
            f"{', '.join(SUITES)}"
        )
    if options.data is not None and not options.data.is_dir():
        raise UsageError(f"--data {options.data} is not a folder")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out} is not a folder: name another")


def _obstacle(task: str, options: EvaluateOptions) -> str | None:
    """Return why a task cannot be run, or None. A local file of questions is read, so that a bad line is found now."""
    if task in generative.CODE_TASKS and not options.allow_code_execution:
        return "it runs programs that the model writes; add --allow-code-execution to run them in a sandbox"
    if options.data is None:
        return None
    path = find_file(options.data, task)
    if path is None:
        return f"{options.data} has no {task}.jsonl"
    rows = read_rows(path, task)
    return multiple_choice.missing_examples(rows, options.mmlu_shots) if task == "mmlu" else None


def run_task(task: str, lm: Any, options: EvaluateOptions) -> TaskResult:
    if task in multiple_choice.TASKS:
        return multiple_choice.run(task, lm, options.data, options.limit, mmlu_shots=options.mmlu_shots)
    path = find_file(options.data, task) if options.data else None
    rows = read_rows(path, task) if path else generative.hub_rows(task)
    return generative.run(task, lm, rows[: options.limit])


def fingerprint(source: Source, options: EvaluateOptions) -> str:
    """Identify the weights, tokenizer and precision that responses come from."""
    weights = sorted(source.folder.glob("*.safetensors")) + sorted(source.folder.glob("*.bin"))
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    tokenizer = vocabulary.digest(find_tokenizer(source, options.tokenizer))
    text = repr((str(source.folder.resolve()), state, tokenizer, options.dtype, options.device))
    return f"{source.folder.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def show(done: dict[str, TaskResult], name: str, console: Console) -> None:
    """Print the model's scores beside the report's; "?" marks figures not checked against a primary source."""
    models = [model for model in paper.models() if any(paper.score(model, task) for task in done)]
    table = Table(title=f"{name} beside the report ({paper.SOURCE})")
    table.add_column("task", no_wrap=True)
    table.add_column(name, justify="right", style="bold", no_wrap=True)
    for model in models:
        table.add_column(model, justify="right", overflow="fold")
    for task, result in done.items():
        error = "" if result.stderr != result.stderr else f" ±{result.stderr:.3f}"
        reported = [paper.score(model, task) for model in models]
        table.add_row(task, f"{result.score:.3f}{error}", *(str(score) if score else "–" for score in reported))
    console.print(table)
    for task, result in done.items():
        for note in result.notes:
            console.print(f"{task}: {note}", highlight=False, soft_wrap=True)


def draw(done: dict[str, TaskResult], name: str, out: Path, console: Console) -> None:
    """Draw the figures that the results allow, or print that matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        console.print("no figures: pip install 'phi-fast[eval]' for matplotlib", style="yellow")
        return
    scores = {task: result.score for task, result in done.items() if task in paper.TASKS}
    if scores:
        spread = {task: (done[task].stderr, done[task].questions) for task in scores}
        plots.benchmarks(scores, name, out, spread=spread)
    if "toxigen" in done and done["toxigen"].groups:
        plots.safety({name: done["toxigen"].groups}, out)


def _default_out(source: Source, model: str) -> Path:
    if source.run is not None:
        return source.run / "evaluation"
    return (source.folder if Path(model).is_dir() else Path()) / "evaluation"


if __name__ == "__main__":
    sys.exit(main())

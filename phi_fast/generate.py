"""`python -m phi_fast.generate --model RUN_OR_FOLDER`: continue prompts, files of prompts, or talk."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from tokenizers import Tokenizer

from .conversion.load import load
from .errors import UsageError
from .generation import Completion, complete
from .model import Phi
from .sampling import Sampling


@dataclass(frozen=True)
class GenerateOptions:
    """Continue text with a trained phi: --prompt, a --file of them, standard input, or a --chat."""

    model: str
    """A run directory, a checkpoint, a model folder in any layout, or OWNER/NAME on the Hugging Face hub."""
    prompt: tuple[str, ...] = ()
    """Text to continue; several are a batch. Default: standard input, or a chat where that is a terminal. Of a prompt
    that leaves no room in the model's context its end is read."""
    file: Path | None = None
    """Prompts to continue, one a line, or with .jsonl one object with a "prompt" a line."""
    out: Path | None = None
    """With --file: where the results go, as JSON lines in the file's order. Default: standard output."""
    chat: bool = False
    """Talk: each line is put into a dialogue and the answer is streamed; an empty line or end of input leaves."""
    user: str = "Alice"
    """Name that a chat gives to you. phi is no assistant: it continues a dialogue between two people."""
    assistant: str = "Bob"
    """Name that a chat gives to the model."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    """How tokens are drawn."""
    batch_size: int = 8
    """Prompts at once, sorted by length; the results do not depend on it."""
    device: str = "auto"
    """auto: CUDA where torch sees a GPU, else cpu."""
    dtype: str = "auto"
    """auto: fp16 on CUDA, fp32 on a CPU. Or fp32, fp16, bf16."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own (as in `prepare`)."""
    quiet: bool = False
    """No speed line on standard error."""


def main() -> int:
    options = tyro.cli(GenerateOptions, prog="python -m phi_fast.generate", config=(tyro.conf.AvoidSubcommands,))
    console = Console(stderr=True)
    try:
        check(options)
        model, tokenizer = load(options.model, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer)
        return run(options, model, tokenizer, console)
    except (UsageError, ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130


def check(options: GenerateOptions) -> None:
    """Raises UsageError for options that do not go together, OSError where the results could not be written."""
    if (options.file is not None) + bool(options.prompt) + options.chat > 1:
        raise UsageError("--prompt, --file and --chat exclude each other: name one")
    if options.out is not None:
        if options.file is None:
            raise UsageError("--out is where the results of --file go: name that, or leave --out")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("a").close()


def run(options: GenerateOptions, model: Phi, tokenizer: Tokenizer, console: Console) -> int:
    """The command, with the model loaded."""
    start = time.perf_counter()
    talk = options.chat or (sys.stdin.isatty() and not options.file and not options.prompt)
    if options.file:
        results = from_file(options, model, tokenizer, console)
    elif options.prompt:
        results = from_prompts(options, model, tokenizer, sys.stdout)
    elif talk:
        results = chat(options, model, tokenizer, sys.stdin, sys.stdout)
    else:
        results = from_prompts(replace(options, prompt=(sys.stdin.read(),)), model, tokenizer, sys.stdout)
    tokens, seconds = sum(len(result.tokens) for result in results), time.perf_counter() - start
    if not options.quiet and not talk:  # the time of a chat is the user's
        console.print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", highlight=False)
    return 0


def from_prompts(options: GenerateOptions, model: Phi, tokenizer: Tokenizer, out: TextIO) -> list[Completion]:
    """One prompt is echoed and its text streamed; several are printed whole, each under its number."""
    prompts = options.prompt
    if len(prompts) == 1:
        _show(out, prompts[0])
        results = complete(model, tokenizer, prompts, options.sampling, on_text=lambda _, text: _show(out, text))
        _show(out, "\n")
        return results
    results = complete(model, tokenizer, prompts, options.sampling, batch_size=options.batch_size)
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), 1):
        _show(out, f"--- {number}\n{prompt}{result.text}\n")
    return results


def from_file(options: GenerateOptions, model: Phi, tokenizer: Tokenizer, console: Console) -> list[Completion]:
    """JSON lines {"prompt", "completion", "tokens", "reason"} for every line of the file."""
    assert options.file is not None
    prompts = read_prompts(options.file)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("prompts", total=len(prompts))
        results = complete(
            model,
            tokenizer,
            prompts,
            options.sampling,
            batch_size=options.batch_size,
            on_done=lambda *_: bar.advance(task),
        )
    lines = [
        json.dumps({"prompt": p, "completion": r.text, "tokens": len(r.tokens), "reason": r.reason}, ensure_ascii=False)
        for p, r in zip(prompts, results, strict=True)
    ]
    text = "".join(line + "\n" for line in lines)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        _show(sys.stdout, text)
    return results


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file. Raises UsageError naming the line that has none."""
    lines = path.read_text(encoding="utf-8").split("\n")  # a prompt may hold the other breaks that splitlines knows
    if path.suffix != ".jsonl":
        return [line for line in lines if line]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str):
                raise TypeError(f"it is {type(prompt).__name__}, expected text")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f'{path}:{number} is no JSON object with a "prompt": {error}') from error
        prompts.append(prompt)
    return prompts


def chat(options: GenerateOptions, model: Phi, tokenizer: Tokenizer, lines: TextIO, out: TextIO) -> list[Completion]:
    """A dialogue, of which the model's context holds the end."""
    stop = (f"\n{options.user}:", f"\n{options.assistant}:", *options.sampling.stop)
    sampling = replace(options.sampling, stop=stop)
    dialogue = ""
    results: list[Completion] = []
    while True:
        _show(out, f"{options.user}: ")
        line = lines.readline().strip()
        if not line:
            return results
        dialogue += f"{options.user}: {line}\n{options.assistant}:"
        _show(out, f"{options.assistant}:")
        (result,) = complete(model, tokenizer, [dialogue], sampling, on_text=lambda _, text: _show(out, text))
        _show(out, "\n")
        dialogue += f"{result.text}\n"
        results.append(result)


def _show(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m phi_fast.generate --model RUN_OR_FOLDER`: continue prompts or files of prompts, chat, or serve."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from phi_fast.startup import begin

    begin("phi_fast.generate", "" if "--quiet" in sys.argv else "PyTorch")

import codecs
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TextIO

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from .conversion.folder import chat_files
from .conversion.load import load
from .conversion.source import Source
from .data.chat import ChatFiles, require_transformers
from .errors import UsageError
from .files import write_atomically, writing
from .generation import Completion, Sampling, complete
from .generation.dialogue import Dialogue, Named, Templated
from .json_files import Fields, parse_lines
from .kernels.backend import isa_problem
from .model.phi import Phi
from .serving import server
from .startup import tolerate_encodings
from .terminal import console as open_console
from .terminal import printable


@dataclass(frozen=True)
class GenerateOptions:
    """Continue text with a trained phi: from --prompt, from --file, from standard input, in a --chat, or by HTTP."""

    model: str
    """A run directory, a checkpoint, a model folder in any layout, or OWNER/NAME on the Hugging Face hub."""
    prompt: tuple[str, ...] = ()
    """Text to continue; several prompts are batched. Default: standard input, or a chat if that is a terminal. If a
    prompt leaves no room in the model's context, only its end is read."""
    file: Path | None = None
    """File of prompts in UTF-8: one per line, or in a .jsonl file one object with a "prompt" per line."""
    out: Path | None = None
    """File for the results of --file: JSON lines in the order of the prompts, written when all are complete. Default:
    standard output."""
    chat: bool = False
    """Chat: each line is added to a dialogue and the answer is streamed; an empty line or the end of input ends it. A
    model with a chat template sees the dialogue as the template renders it."""
    serve: bool = False
    """Serve OpenAI's API by HTTP: /v1/completions, /v1/chat/completions, /v1/models. Requests join the running batch,
    of at most --batch-size. Needs the extra `serve`."""
    host: str = "127.0.0.1"
    """Address to serve at. The default can be reached from this machine only; the server asks for no password."""
    port: int = 8000
    """Port to serve at; 0: any free one."""
    queue: int = 64
    """Maximum number of texts that wait for a place in the served batch; further requests get status 429."""
    user: str = "Alice"
    """Your name in a chat with a model without a chat template, which continues a dialogue between two people."""
    assistant: str = "Bob"
    """The model's name in such a chat."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(temperature=0.8))
    """Sampling settings; with --serve, those that a request leaves out (but --seed: each such request draws its own).
    In --stop, "\\n" is a newline, "\\t" a tab and "\\\\" a backslash."""
    n: int = 1
    """Samples per prompt; more than 1 needs a temperature above 0."""
    batch_size: int = 8
    """Prompts per batch, sorted by length; the results do not depend on it. With --serve each place in the batch has a
    cache for the whole context: 403 MB for phi-1.5 in fp16."""
    device: str = "auto"
    """auto: CUDA if torch sees a GPU, else cpu."""
    dtype: str = "auto"
    """auto: fp16 on CUDA, fp32 on a CPU. Or fp32, fp16, bf16."""
    ema: bool = False
    """Use the moving average of the weights, which a run with --ema-decay keeps."""
    tokenizer: str | None = None
    """Tokenizer to use (as in `prepare`). Default: the model's own."""
    quiet: bool = False
    """Print no speed on standard error."""


def main() -> int:
    tolerate_encodings()
    options = tyro.cli(GenerateOptions, prog="python -m phi_fast.generate", config=(tyro.conf.AvoidSubcommands,))
    console = open_console(stderr=True, soft_wrap=True)
    try:
        stop = tuple(unescape(text) for text in options.sampling.stop)
        options = replace(options, sampling=replace(options.sampling, stop=stop))
        check(options)
        if problem := isa_problem():
            raise UsageError(problem)
        listening = server.listen(options.host, options.port) if options.serve else None
        source = Source.open(options.model)
        template = chat_files(source, options.tokenizer)
        if template is not None and (options.chat or options.serve):
            require_transformers("a chat by the model's chat template")
        model, tokenizer = load(
            source, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer, ema=options.ema
        )
        if listening is None:
            return run(options, model, tokenizer, console, template)
        server.serve(
            listening,
            model,
            tokenizer,
            name=options.model,
            template=template,
            people=(options.user, options.assistant),
            defaults=options.sampling,
            slots=options.batch_size,
            queue=options.queue,
            tell=lambda line: console.print(printable(line)),
        )
        return 0
    except (UsageError, ValueError, OSError) as error:
        console.print(printable(f"error: {error}"), style="red")
        return 2
    except KeyboardInterrupt:
        return 130


def unescape(text: str) -> str:
    """Replace the escapes of a Python string, such as "\\n", by their characters; UsageError for a bad escape."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise UsageError(f"--stop {text!r}: {error.reason}; a backslash itself is written twice") from error


def check(options: GenerateOptions) -> None:
    """Raise UsageError for options that exclude each other, or results that could not be written."""
    if (options.file is not None) + bool(options.prompt) + options.chat + options.serve > 1:
        raise UsageError("--prompt, --file, --chat and --serve exclude each other: name one")
    if options.serve and options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size}: expected at least 1")
    if options.queue < 0:
        raise UsageError(f"--queue {options.queue}: expected 0 (no one waits) or more")
    if options.n > 1 and options.serve:
        raise UsageError("--n is for prompts: a request to the server names its own n")
    if options.n < 1:
        raise UsageError(f"--n {options.n}: expected at least 1")
    if options.n > 1 and options.sampling.temperature == 0:
        raise UsageError(f"--n {options.n} at temperature 0 is the same text {options.n} times: raise --temperature")
    if options.n > 1 and options.chat:
        raise UsageError("--n is for prompts: a chat has one answer")
    for prompt in options.prompt:
        _require_text(prompt, "--prompt")
    if options.out is not None:
        if options.file is None:
            raise UsageError("--out is for the results of --file: give --file, or leave --out out")
        _check_out(options.out, options.file)
    if options.file is not None and options.file.is_file():  # a pipe can be read only once
        read_prompts(options.file)


def _check_out(out: Path, file: Path) -> None:
    """Raise UsageError if `out` could not be written at the end, without writing anything now."""
    if out.exists():
        if file.exists() and out.samefile(file):
            raise UsageError(f"--out {out} is the file of prompts, {file}, itself: name another")
        if out.is_dir():
            raise UsageError(f"--out {out}: Is a directory; name a file")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK) or (there != out and not there.is_dir()):
        raise UsageError(f"--out {out}: {there} cannot be written to; name another place")


def _require_text(text: str, where: str) -> None:
    """Raise UsageError for bytes that Python could not decode, or an unpaired surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} has {text[error.start]!r} at position {error.start}, which is not UTF-8") from None


def run(
    options: GenerateOptions, model: Phi, tokenizer: Tokenizer, console: Console, template: ChatFiles | None = None
) -> int:
    """Run the command with the loaded model, and the chat template beside it; returns the command's exit status."""
    start = time.perf_counter()
    talk = options.chat or (sys.stdin.isatty() and not options.file and not options.prompt)
    if options.file:
        results = from_file(options, model, tokenizer, console)
    elif options.prompt:
        results = from_prompts(options, model, tokenizer, sys.stdout)
    elif talk:
        results = chat(options, model, tokenizer, sys.stdin, sys.stdout, template)
    else:
        results = from_prompts(replace(options, prompt=(_standard_input(),)), model, tokenizer, sys.stdout)
    tokens, seconds = sum(len(result.tokens) for result in results), time.perf_counter() - start
    if not options.quiet and not talk:  # a chat's time is mostly the user's typing
        console.print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    return 0


def from_prompts(options: GenerateOptions, model: Phi, tokenizer: Tokenizer, out: TextIO) -> list[Completion]:
    """Print a single prompt and stream its text; print several prompts or samples when complete, with numbers."""
    prompts = _repeated(options.prompt, options.n)
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
    """Write JSON lines {"prompt", "completion", "tokens", "reason"}: --n lines per prompt in the file."""
    assert options.file is not None
    prompts = _repeated(read_prompts(options.file), options.n)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
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
        _write(options.out, text)
    else:
        _show(sys.stdout, text)
    return results


def _repeated(prompts: Sequence[str], n: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(n)]


def _write(out: Path, text: str) -> None:
    with writing(out, "make room or grant write permission, or name another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not out.is_file():  # a pipe, a device
            out.write_text(text, encoding="utf-8")
        else:
            write_atomically(out.resolve(), text.encode())


def read_prompts(path: Path) -> list[str]:
    """Read a file of prompts. Raises UsageError naming a line that has no prompt, or is not UTF-8 or JSON."""
    text = decode(path.read_bytes(), str(path))
    if path.suffix != ".jsonl":
        prompts = [line for line in text.split("\n") if line]  # splitlines would also split at other characters
        return prompts or _no_prompts(path)
    prompts = []
    for where, value in parse_lines(text.encode(), str(path), whole=True):
        prompt = Fields.of(value, where, 'Expected an object with a "prompt" on each line').text("prompt")
        _require_text(prompt, where)
        prompts.append(prompt)
    return prompts or _no_prompts(path)


def _no_prompts(path: Path) -> NoReturn:
    raise UsageError(f"{path} has no prompts: expected one on each line")


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text, with or without a byte order mark, with "\\n" for every line end.

    Raises UsageError naming the line and the byte that is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UsageError(f"{where}:1 looks like UTF-16, expected UTF-8: save it as UTF-8") from None
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise UsageError(
            f"{where}:{line} has byte 0x{byte:02x}, which is not UTF-8 (it is {bytes([byte]).decode('latin-1')!r} in "
            "Latin-1): save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _standard_input() -> str:
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if buffer is None else decode(buffer.read(), "standard input")


def chat(
    options: GenerateOptions,
    model: Phi,
    tokenizer: Tokenizer,
    lines: TextIO,
    out: TextIO,
    template: ChatFiles | None = None,
) -> list[Completion]:
    """Hold a dialogue; when it outgrows the model's context, the model sees only its end."""
    dialogue: Dialogue = Named(options.user, options.assistant)
    if template is not None:
        room = max(model.config.max_position_embeddings - options.sampling.max_new_tokens, 1)
        dialogue = Templated(template, tokenizer, room)
    sampling = replace(options.sampling, stop=(*dialogue.stop, *options.sampling.stop))
    results: list[Completion] = []
    while True:
        _show(out, f"{dialogue.user}: ")
        line = lines.readline().strip()
        if not line:
            return results
        prompt = dialogue.ask(line)
        _show(out, f"{dialogue.assistant}:{dialogue.gap}")
        (result,) = complete(model, tokenizer, [prompt], sampling, on_text=lambda _, text: _show(out, text))
        _show(out, "\n")
        dialogue.answer(result.text)
        results.append(result)


def _show(out: TextIO, text: str) -> None:
    """Write text from a model or a user: as it is to a file or pipe, with control characters escaped to a terminal."""
    out.write(printable(text) if out.isatty() else text)
    out.flush()


if __name__ == "__main__":
    sys.exit(main())

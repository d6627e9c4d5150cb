"""The words of README.md and docs/ held to the code: every command parses, snippets run, the drawing is the imports."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from torch.distributed.run import parse_args as torchrun_options

from benchmarks.loopback import http_server
from phi_fast.config import PhiConfig
from phi_fast.conversion.source import Source
from phi_fast.training.distributed import deepspeed
from phi_fast.training.options import parse as parse_training

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {".", "cd", "echo", "git", "mkdir", "pip"}
"""Commands of a page that are not this project's."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """Of its first line of text, counted from 1."""
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a page, as words."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.words)}"[:110]


def blocks(page: Path, language: str) -> list[Block]:
    found, start, kind = [], None, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if start is None and (match := re.fullmatch(r"```(\w*).*", line)):
            start, kind = number, match[1]
        elif start is not None and line == "```":
            if kind == language:
                found.append(Block(page, start + 1, kind, "\n".join(lines[start : number - 1])))
            start = None
    return found


def commands(page: Path) -> list[Command]:
    """Those of ```sh blocks, of lines indented as code, and of inline code that begins with "python -m phi_fast."."""
    found = []
    for block in blocks(page, "sh"):
        waiting: list[str] = []
        for number, line in enumerate(block.text.splitlines(), block.line):
            waiting.append(line.removesuffix("\\"))
            if line.endswith("\\"):
                continue
            if words := _words(" ".join(waiting)):
                found.append(Command(page.name, number, words))
            waiting = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("    python -m "):
            found.append(Command(page.name, number, _words(line)))
        for span in re.findall(r"`(python -m phi_fast\.[^`]*)`", line):
            found.append(Command(page.name, number, _words(span.replace("…", ""))))
    return found


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    for mark in (">", ">>", "|"):
        if mark in words:
            words = words[: words.index(mark)]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return tuple(words)


COMMANDS = [command for page in PAGES for command in commands(page)]


class Parsed(BaseException):
    """A command line was understood; nothing was run."""


def module_and_options(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """What Python is told to run, by `python -m`, torchrun, deepspeed or a make target; None for other commands."""
    if words[0] == "make":
        return _make(words[1:])
    if words[0] == "torchrun":
        launched = torchrun_options(list(words[1:]))
        assert launched.module
        return launched.training_script, launched.training_script_args
    if words[0] == "deepspeed":
        deepspeed("cpu")
        launched = importlib.import_module("deepspeed.launcher.runner").parse_args(list(words[1:]))
        assert launched.module
        return launched.user_script, launched.user_args
    return (words[2], list(words[3:])) if words[:2] == ("python", "-m") else None


def _make(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """The Python command of a make target, which must exist."""
    target = next(word for word in words if "=" not in word)
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(rf"^{re.escape(target)}(?: [\w-]+)*:(?!=).*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
    assert recipe or re.search(rf"^[\w -]*\b{re.escape(target)}\b[\w -]*:", makefile, re.MULTILINE), (
        f"no target {target}"
    )
    arguments = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
    if recipe and (match := re.search(r"python -m (phi_fast\S+)(.*)", recipe[1])):
        return match[1], shlex.split(match[2].replace("$(ARGS)", arguments))
    return None


@pytest.mark.parametrize("command", COMMANDS, ids=str)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module exists, and its own parser takes the options; it stops there."""
    found = module_and_options(command.words)
    if found is None:
        assert command.words[0] in SHELL | {"make", "pytest"}, f"what is {command.words[0]}?"
        return
    module, options = found
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    if options:
        parse_only(module, options, monkeypatch)


def parse_only(module: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `python -m module options` up to where its options are understood."""

    def stop_after(parse: Any) -> Any:
        def parse_and_stop(*positional: Any, **keywords: Any) -> Any:
            parse(*positional, **keywords)
            raise Parsed

        return parse_and_stop

    # --init-from's weights set the default shape, so they are opened before the options are read.
    monkeypatch.setattr(Source, "open", lambda name: SimpleNamespace(config=PhiConfig()))
    monkeypatch.setattr(tyro, "cli", stop_after(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(sys, "argv", [module, *options])
    monkeypatch.chdir(ROOT)
    try:
        main = importlib.import_module(module).main
        if all(parameter.default is not parameter.empty for parameter in inspect.signature(main).parameters.values()):
            main()
        else:  # it is handed its options by the lines at the end of the module
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
        return
    except SystemExit as status:
        assert status.code == 0 and "--help" in options, f"{module} {options} exits with {status.code}"
        return
    pytest.fail(f"{module} did not read its options")


def test_a_wrong_option_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="exits with 2"):
        parse_only("phi_fast.plan", ["--recpie", "phi-1.5"], monkeypatch)


class Enough(Exception):
    """Ends a snippet that would go on for ever."""


def _three_batches() -> dict[str, Any]:
    """What docs/data.md's snippets take as given: a model, and the URL of a remote corpus."""
    seen: list[int] = []

    def model(input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        assert input_ids.shape == labels.shape == (8, 2048)
        seen.append(1)
        if len(seen) > 3:
            raise Enough
        return SimpleNamespace(loss=torch.zeros(()))

    return {"model": model, "url": f"{http_server(Path('data')).url}/stdlib/docs"}


def _web_pages() -> dict[str, Any]:
    """What docs/datatrove.md's snippet reads: scored pages in data/web."""
    (Path("data") / "web").mkdir()
    for i in range(2):
        pages = [{"text": f"Page {j} of {i % 2}.", "scores": {"educational": j % 6}} for j in range(120)]
        Path("data", "web", f"{i}.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    return {}


GIVEN = {"data.md": _three_batches, "datatrove.md": _web_pages}
"""What a page's snippets take as given, by the page's name."""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_snippets_run(page: Path, stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of a page, from its first to its last, in one namespace, beside a corpus at data/stdlib."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stdlib").symlink_to(stdlib)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__snippet__", **GIVEN.get(page.name, dict)()}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        try:
            exec(code, names)
        except Enough:
            continue


QUICK_START = ROOT / "docs" / "quick-start.md"
SMALL = (
    "--model.hidden-size 64 --model.num-attention-heads 1 --model.num-hidden-layers 1 --sequence-length 64 "
    "--global-batch-size 2 --tokens 512 --val-every 0 --sample-tokens 4 --model.max-position-embeddings 128"
)
SMALL_CHAT = SMALL.replace("embeddings 128", "embeddings 256")
"""With room for the rows of conversations."""


def run_quick_start(folder: Path, stdlib: Path, training: str) -> list[str]:
    """The page's commands, one after the other, in `folder`; returns what each printed.

    `make train` is its Python command, with the options of `training`; what installs is left out.
    """
    (folder / "data").mkdir()
    (folder / "data" / "stdlib").symlink_to(stdlib)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = []
    for block in blocks(QUICK_START, "sh"):
        for line in block.text.splitlines():
            if line.startswith(("pip ", ". ")):
                continue
            command = f"python -m phi_fast.train {training}" if line == "make train" else line
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout + done.stderr)
    [serving] = blocks(QUICK_START, "bash")
    printed.append(serve_and_ask(serving.text, folder))
    return printed


def serve_and_ask(text: str, folder: Path) -> str:
    """Run a block that starts a server and ends it, at a free port instead of 8000; return what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    text = text.replace("8000", port).replace("--serve", f"--serve --port {port}")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("pip "))
    return in_bash(f"trap 'kill $(jobs -p) || true' EXIT\n{text}\nwait", folder)


def check_quick_start(folder: Path, printed: list[str]) -> None:
    assert (folder / "runs" / "tiny" / "report.html").is_file()
    assert (folder / "phi-tiny-hf" / "config.json").is_file()
    assert (folder / "runs" / "tiny" / "evaluation" / "results.json").is_file()
    everything = "\n".join(printed)
    for word in ("The module", "arc_easy", "1,418,270,720", '"object":"chat.completion"'):
        assert word in everything


@pytest.mark.slow
def test_the_quick_start_works_small(tmp_path: Path, stdlib: Path) -> None:
    check_quick_start(tmp_path, run_quick_start(tmp_path, stdlib, SMALL_CHAT))
    check_shipping(tmp_path)


def check_shipping(folder: Path) -> None:
    """Run the server, the questions to it and the GGUF conversion of shipping.md on the run of the quick start."""
    page = ROOT / "docs" / "shipping.md"
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    [serve] = [line for line in lines if "--serve" in line]
    [questions] = blocks(page, "bash")
    waiting = "curl --silent --fail --retry 120 --retry-delay 1 --retry-connrefused "
    asked = serve_and_ask(f"{serve} 2> server.log &\n{questions.text.replace('curl ', waiting)}\nkill $!", folder)
    assert '"object":"text_completion"' in asked and '"chat.completion.chunk"' in asked and "data: [DONE]" in asked
    [convert] = [line for line in lines if "--gguf" in line]
    in_bash(convert, folder)
    assert (folder / "tiny.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
def test_the_quick_start_works_whole_in_twenty_minutes(tmp_path: Path, stdlib: Path) -> None:
    start = time.perf_counter()
    printed = run_quick_start(tmp_path, stdlib, "")
    assert time.perf_counter() - start < 20 * 60
    check_quick_start(tmp_path, printed)


AT_SCALE = ROOT / "docs" / "at-scale.md"


@pytest.mark.slow
def test_the_sweep_trains_and_is_drawn(tmp_path: Path, stdlib: Path) -> None:
    """The page's file, and its loop over that file and a second one."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stdlib").symlink_to(stdlib)
    (tmp_path / "sweep").mkdir()
    [file], [loop, _] = blocks(AT_SCALE, "toml"), blocks(AT_SCALE, "bash")
    small = "\nval_every = 0\nsample_tokens = 0\nglobal_batch_size = 2\nsequence_length = 64\n"
    text = file.text.replace("2e5", "512") + small.replace(
        "\nv", "\nmodel.hidden_size = 64\nmodel.num_attention_heads = 1\nv"
    )
    (tmp_path / "sweep" / "low.toml").write_text(text, encoding="utf-8")
    in_bash(loop.text, tmp_path)
    page = (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    assert "learning_rate" in page and "0.001" in page and "0.003" in page


@pytest.mark.slow
def test_the_branch_trains_and_is_drawn(tmp_path: Path, stdlib: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stdlib").symlink_to(stdlib)
    [_, commands] = blocks(AT_SCALE, "bash")
    small = SMALL.replace("--tokens 512", f"--tokens {150 * 128}")
    in_bash(commands.text.replace("--tokens 4e5", small), tmp_path)
    lines = (tmp_path / "runs" / "decayed" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(101, 121))
    assert (tmp_path / "runs" / "stable-and-decayed.html").is_file()


def in_bash(text: str, folder: Path) -> str:
    """Run a block of a page in `folder`, with this Python as python; return what it prints."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_file_of_the_sweep_is_read(tmp_path: Path) -> None:
    [file] = blocks(AT_SCALE, "toml")
    (tmp_path / "low.toml").write_text(file.text, encoding="utf-8")
    options = parse_training(["--config", str(tmp_path / "low.toml")])
    options.check()
    assert (options.tokens, options.mixture, options.model.num_hidden_layers) == (200_000, {"docs": 50, "code": 50}, 2)
    assert options.mixture_stages == ((80, {"docs": 1}),)


@pytest.mark.slow
def test_the_fine_tuning_page_works(tmp_path: Path, stdlib: Path) -> None:
    """The page's commands from a small run of the default recipe on, but for those of the hub's phi-1.5."""
    run_page(tmp_path, stdlib, SMALL_CHAT)
    records = [json.loads(line) for line in (tmp_path / "runs" / "chat" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["val_loss"] < records[0]["val_loss"] - 0.1


def run_page(folder: Path, stdlib: Path, training: str) -> None:
    """Run the commands of docs/fine-tuning.md after `python -m phi_fast.train` with the options of `training`."""
    (folder / "data").mkdir()
    (folder / "data" / "stdlib").symlink_to(stdlib)
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    lines = [line for block in blocks(ROOT / "docs" / "fine-tuning.md", "sh") for line in block.text.splitlines()]
    for line in [f"python -m phi_fast.train {training}", *lines]:
        if "microsoft" not in line:
            done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def drawing() -> tuple[dict[str, str], set[tuple[str, str]]]:
    """(module or folder -> room, arrows) of the drawing."""
    [block] = blocks(ARCHITECTURE, "mermaid")
    rooms = {}
    for room, label in re.findall(r'^ +(\w+)\["([^"]*)"\]', block.text, re.MULTILINE):
        title, _, members = label.partition("<br>")
        for member in members.split() or [title]:
            assert member not in rooms, f"{member} is drawn twice"
            rooms[member] = room
    return rooms, set(re.findall(r"^ +(\w+) --> (\w+)$", block.text, re.MULTILINE))


def imports() -> dict[tuple[str, str], str]:
    """(module or folder of phi_fast, one that it imports) -> a file where it does; imports inside functions count."""
    files = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "phi_fast").rglob("*.py"))}
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        files[path] = ("phi_fast", *path.relative_to(ROOT).with_suffix("").parts)
    found = {}
    for path, parts in files.items():
        own = parts[1]
        for target in _targets(ast.parse(path.read_text(encoding="utf-8")), parts):
            if target[0] == "phi_fast":
                other = target[1] if len(target) > 1 else "__init__"
                if other != own:
                    found[own, other] = str(path.relative_to(ROOT))
    return found


def _targets(tree: ast.Module, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Dotted names that a file imports, relative ones resolved; `from . import x` is x."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (*parts[: -node.level], *(node.module or "").split(".")) if node.level else node.module.split(".")  # type: ignore[union-attr]
            base = tuple(word for word in base if word)
            found += [(*base, alias.name) if len(base) == 1 else base for alias in node.names]
    return found


def test_the_drawing_is_the_imports() -> None:
    rooms, arrows = drawing()
    real: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (own, other), file in imports().items():
        if own == "__init__" and other == "__version__":
            continue
        assert own in rooms, f"{own} ({file}) is in no room of the drawing"
        if other == "__version__" or (other not in rooms and other[0].isupper()):
            other = "__init__"
        assert other in rooms, f"{other}, imported by {file}, is in no room of the drawing"
        if rooms[own] != rooms[other]:
            real[rooms[own], rooms[other]].append(file)
    missing = {f"{a} --> {b}": files[0] for (a, b), files in real.items() if (a, b) not in arrows}
    assert not missing, "imports that are not drawn"
    assert not arrows - set(real), "arrows without an import"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_rooms_import_downwards_only() -> None:
    _, arrows = drawing()
    graph: dict[str, set[str]] = defaultdict(set)
    for room, other in arrows:
        graph[room].add(other)
    assert not circle(graph)


@pytest.mark.parametrize("package", ["phi_fast", "kernels", "benchmarks"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Imports inside functions count; those for annotations alone do not."""
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted((ROOT / package).rglob("*.py"))}
    names = {".".join(parts).removesuffix(".__init__"): (parts, path) for parts, path in files.items()}
    graph = {}
    for name, (parts, path) in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
        targets = {".".join(target) for target in _members(tree, parts)}
        graph[name] = {target for target in targets if target in names and target != name}
        # `from package import name` of a module is that module, of anything else it is the package.
        graph[name] |= {t.rpartition(".")[0] for t in targets if t not in names} & set(names) - {name}
    assert any(graph.values())
    assert not circle(graph)


def _members(tree: ast.Module, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Dotted names of what a file imports, each with the name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def test_kernels_know_no_trainer() -> None:
    assert {other for own, other in imports() if own == "kernels"} <= {"_C"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page, link, anchor and name in the API reference is there."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    assert "parallel_block" in (tmp_path / "api" / "kernels" / "index.html").read_text(encoding="utf-8")
    assert "overview.png" in (tmp_path / "index.html").read_text(encoding="utf-8")

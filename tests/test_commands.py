"""What every command has in common: any encoding of the terminal, names as people type them."""

from __future__ import annotations

import ast
import importlib
import io
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from phi_fast import plan
from phi_fast.errors import UsageError
from phi_fast.evaluate import EvaluateOptions
from phi_fast.planning.devices import find_device
from phi_fast.training import options

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "phi_fast.plan": ["--recipe", "phi-1.5", "--gpu", "H100", "--gpus", "8"],
    "phi_fast.report": ["no → run"],
    "phi_fast.prepare": ["no → file", "--tokenizer", "no → tokenizer", "--out", "x → y"],
    "phi_fast.convert": ["no → model", "x → y"],
    "phi_fast.generate": ["--model", "no → model", "--prompt", "x"],
    "phi_fast.evaluate": ["--model", "no → model", "--tasks", "x →"],
    "phi_fast.train": ["--data", "no → data", "--kernels", "no → kernels"],
    "phi_fast.verify": ["--ops", "layer_norm", "--dtypes", "fp32", "--backends", "reference"],
    "phi_fast.kernels.codegen": ["--only", "no → kernel"],
    "benchmarks.report": ["--results", "no → results"],
}
"""Every entry point with a command line of ordinary or wrong words."""
NOT_COMMANDS = {
    *("phi_fast.evaluation.sandbox.launcher", "phi_fast.evaluation.sandbox.inside"),  # started by the sandbox
    *("phi_fast.evaluation.lm", "benchmarks.zero2", "benchmarks.one_process"),  # lm-eval's command; parts of benchmarks
}


def test_every_entry_point_is_here() -> None:
    found = set()
    for folder, package in (("phi_fast", "phi_fast"), ("kernels", "phi_fast.kernels"), ("benchmarks", "benchmarks")):
        for path in (ROOT / folder).rglob("*.py"):
            if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                found.add(".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)))
    assert found == set(COMMANDS) | NOT_COMMANDS


def outcome(command: str, words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Status, and the words of both streams that every encoding can write."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    status: object = 0
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", [command, *words])
        try:
            if command == "phi_fast.kernels.codegen":
                runpy.run_module(command, run_name="__main__", alter_sys=True)
            else:  # a trainer that ran as __main__ would leave the process group that other tests are in
                status = importlib.import_module(command).main()
        except SystemExit as ended:
            status = ended.code or 0
    for stream in streams.values():
        stream.flush()
    text = "\n".join(stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    plain = re.sub(r"\\(u[0-9a-f]{4}|x[0-9a-f]{2})|[^\x00-\x7f]", " ", text)
    return status, re.findall(r"[A-Za-z][A-Za-z_-]+", plain)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_encoding_changes_neither_status_nor_words(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it lacks is escaped; the rest is the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for words in (["--help"], COMMANDS[command]):
        expected = outcome(command, words, "utf-8", monkeypatch)
        assert expected[1]
        for encoding in ("ascii", "latin-1"):
            assert outcome(command, words, encoding, monkeypatch) == expected


def test_inspecting_a_corpus_on_any_encoding(stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--inspect", str(stdlib / "docs")]
    status, said = outcome("phi_fast.prepare", words, "utf-8", monkeypatch)
    assert status == 0 and len(said) > 20
    assert outcome("phi_fast.prepare", words, "ascii", monkeypatch)[0] == 0


def consoles(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls of rich's Console, or of a progress column of text, under whatever name they were imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "rich":
                    names[alias.asname or "rich"] = alias.name if alias.asname else "rich"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            word = ast.unparse(node.func)
            first, _, rest = word.partition(".")
            whole = f"{names[first]}.{rest}".rstrip(".") if first in names else names.get(word, "")
            if whole.startswith("rich") and whole.endswith((".Console", ".TextColumn", ".get_console", ".print")):
                yield node


def test_no_console_reads_what_a_user_typed_as_markup() -> None:
    """phi_fast.terminal makes them all; a module that cannot import it turns markup off itself."""
    seen = 0
    for path in sorted(path for part in ("phi_fast", "kernels", "benchmarks") for path in (ROOT / part).rglob("*.py")):
        for call in consoles(ast.parse(path.read_text(encoding="utf-8"))):
            seen += 1
            settings = {word.arg: ast.unparse(word.value) for word in call.keywords}
            off = settings.get("markup") == "False" or "'markup': False" in ast.unparse(call)
            assert off, f"{path}:{call.lineno}"
    assert seen >= 3


@pytest.mark.parametrize(
    "source",
    [
        "from rich.console import Console as C\nC(stderr=True)",
        "import rich.console\nrich.console.Console()",
        "import rich\nrich.print('x')",
        "from rich import print\nprint('x')",
        "from rich import console\nconsole.Console()",
    ],
)
def test_consoles_are_found_under_any_name(source: str) -> None:
    assert len(list(consoles(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [("h100", "H100"), ("A100", "A100-80"), ("4090", "RTX-4090"), ("rtx 5090", "RTX-5090"), ("l40s", "L40S")],
)
def test_gpus_are_known_as_people_type_them(name: str, found: str) -> None:
    assert find_device(name, None, None, None).name == found


def test_another_gpu_is_planned_by_its_figures_or_answered_with_the_nearest() -> None:
    device = find_device("X1", 96.0, 500.0, 1000.0)
    assert device.name == "X1" and device.memory is not None
    assert (device.memory.value, device.flops.value, device.bandwidth.value) == (96e9, 500e12, 1000e9)
    with pytest.raises(UsageError, match=r"--gpu H10 is not known. Did you mean H100.*--memory, --flops and"):
        find_device("H10", None, None, None)
    with pytest.raises(UsageError, match=r"--flops -1.0: expected a positive number"):
        find_device("H100", None, -1.0, None)


def test_counts_and_lists_are_taken_as_people_type_them() -> None:
    assert plan.parse(["--tokens", "1e9"]).tokens == 10**9
    for words in (["arc_easy,piqa"], ["arc_easy", "piqa"], ["arc_easy,", "piqa"]):
        assert options.parse(["--eval-tasks", *words]).eval_tasks == ("arc_easy", "piqa")
    assert tyro.cli(EvaluateOptions, args=["--model", "m", "--tasks", "arc_easy,piqa"]).tasks == ("arc_easy", "piqa")

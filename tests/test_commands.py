"""What every command has in common: any encoding of the terminal, names as people type them."""

from __future__ import annotations

import ast
import importlib
import io
import sys
from pathlib import Path

import pytest
import tyro

from phi_fast import plan
from phi_fast.errors import UsageError
from phi_fast.evaluate import EvaluateOptions
from phi_fast.planning.devices import find_device
from phi_fast.training import options

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "prepare", "generate", "evaluate", "convert", "report", "plan", "verify")
ORDINARY = {
    "plan": ["--recipe", "phi-1.5", "--gpu", "H100", "--gpus", "8"],
    "report": ["no → run"],
    "prepare": ["no → file", "--tokenizer", "no → tokenizer", "--out", "x → y"],
    "convert": ["no → model", "x → y"],
    "generate": ["--model", "no → model", "--prompt", "x"],
    "evaluate": ["--model", "no → model", "--tasks", "x →"],
    "train": ["--data", "no → data", "--kernels", "no → kernels"],
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_ordinary_output_on_any_encoding(
    command: str, encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"phi_fast.{command}").main
    for words in (["--help"], *([ORDINARY[command]] if command in ORDINARY else [])):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", [command, *words])
        try:
            status = main()
        except SystemExit as ended:
            status = ended.code
        for stream in streams.values():
            stream.flush()
        assert status in (0, None, 1, 2)
        assert any(stream.buffer.getvalue() for stream in streams.values())


def test_no_module_makes_a_console_that_reads_markup() -> None:
    """phi_fast.terminal makes them all; the kernels, which cannot import it, print only their own words."""
    for path in sorted((ROOT / "phi_fast").rglob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "Console", f"{path}:{node.lineno}"
                if node.func.id == "TextColumn":
                    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert settings.get("markup") == "False", f"{path}:{node.lineno}"


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
    with pytest.raises(UsageError, match=r"--gpu H10 is not known: did you mean H100.*--memory, --flops and"):
        find_device("H10", None, None, None)
    with pytest.raises(UsageError, match=r"--flops -1.0: expected a positive number"):
        find_device("H100", None, -1.0, None)


def test_counts_and_lists_are_taken_as_people_type_them() -> None:
    assert plan.parse(["--tokens", "1e9"]).tokens == 10**9
    for words in (["arc_easy,piqa"], ["arc_easy", "piqa"], ["arc_easy,", "piqa"]):
        assert options.parse(["--eval-tasks", *words]).eval_tasks == ("arc_easy", "piqa")
    assert tyro.cli(EvaluateOptions, args=["--model", "m", "--tasks", "arc_easy,piqa"]).tasks == ("arc_easy", "piqa")

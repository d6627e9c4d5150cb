"""Common behaviour of all commands: they work with any terminal encoding and print users' names unchanged."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from model_folders import tiny_tokenizer
from printed_markup import findings

from phi_fast import plan, prepare
from phi_fast.errors import UsageError
from phi_fast.evaluate import EvaluateOptions
from phi_fast.planning.devices import find_device
from phi_fast.training import options

ROOT = Path(__file__).parents[1]
ROOMS = {"phi_fast": "phi_fast", "kernels": "phi_fast.kernels", "benchmarks": "benchmarks"}
"""Folder -> the package name of its modules."""
NOT_FOR_PEOPLE = {
    *("phi_fast.evaluation.sandbox.launcher", "phi_fast.evaluation.sandbox.inside"),
    *(f"benchmarks.gpu.{name}" for name in ("start", "kit", "kernel_cache", "small_launches")),
    "benchmarks.gpu.predictions",
}
"""The sandbox's two processes, which only the sandbox starts, in a separate root, and which print JSON; what `make gpu`
and `make gpu-kit` start, by another Python than this one; and the writer of a page, which prints nothing."""
RESULTS = "before → after.json"
MISSING_MODEL = ["--model", "phi_fast", "--model_args", "pretrained=no → model", "--tasks", "arc_easy"]
SERVER = ["--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--max-tokens-total", "9"]
NO_DATA = ["--data", "no → data", "--run-dir", "x → runs"]
PRINTING: dict[str, list[list[str]]] = {
    "phi_fast.train": [["--data", "no → data", "--kernels", "no → kernels"]],
    "phi_fast.prepare": [
        ["--inspect", "corpus → é"],
        ["--inspect", "no → corpus"],
        ["no → file", "--tokenizer", "no → tokenizer", "--out", "x → y"],
    ],
    "phi_fast.curate": [
        ["exact-dedup", "no → file", "--out", "x → y"],
        ["score", "x", "--out", "y", "--classifier", "no → file.skops"],
    ],
    "phi_fast.data.stdlib_conversations": [["x → é.jsonl", "--count", "1"], ["x.jsonl", "--count", "0"]],
    "phi_fast.generate": [["--model", "no → model", "--prompt", "x"], ["--model", "x", "--file", "prompts → é.jsonl"]],
    "phi_fast.evaluate": [["--model", "no → model", "--tasks", "x →"], ["--model", "é", "--data", "no → data"]],
    "phi_fast.evaluation.lm": [[], MISSING_MODEL],
    "phi_fast.convert": [["no → model", "x → y"]],
    "phi_fast.synthesize": [["--topics", "no → topics", "--out", "x → y", *SERVER], ["--topics", "x"]],
    "phi_fast.report": [["no → run"], []],
    "phi_fast.plan": [
        ["--recipe", "phi-1.5", "--gpu", "H100", "--gpus", "8"],
        ["--recipe", "phi-1.5", "--gpu", "MI300X", "--gpus", "16", "--price", "2.5", "--recompute", "all"],
        ["--gpu", "no → gpu"],
    ],
    "phi_fast.verify": [
        ["--device", "cpu", "--ops", "layer_norm", "--dtypes", "fp32", "--backends", "reference"],
        ["--device", "cpu", "--checkpoint", "no → checkpoint"],
    ],
    "phi_fast.kernels.codegen": [["--only", "no → kernel"], ["--arch", "sm_90", "--only", "layer_norm.forward"]],
    "phi_fast.kernels.tune": [["--seconds", "0"], ["--json", "no → folder/x.json"], ["--list", "--most", "1"]],
    "benchmarks.gpu.__main__": [["--budget", "0"], ["--only", "no → stage"]],
    "benchmarks.report": [
        ["--compare", RESULTS, RESULTS],
        ["--compare", RESULTS, "slower → é.json"],
        ["--compare", RESULTS, "no → results"],
        ["--results", "no → results"],
    ],
    "benchmarks.one_process": [["phi-tiny", "fp32", "no → contender"]],
    "benchmarks.zero2": [["no → preset", "fp32", "1"]],
    "benchmarks.ddp": [["--preset", "no → preset"]],
    "benchmarks.experiments.curation": [["--megabytes", "0"]],
    "benchmarks.experiments.curation_peers": [["no → step"]],
    "benchmarks.experiments.muon": [NO_DATA, ["--steps", "0"]],
    "benchmarks.experiments.remote_data": [["--steps", "0"]],
    "benchmarks.experiments.textbooks": [["--tokens", "0"], ["--seeds", "1", "1"]],
    "benchmarks.experiments.thesis.draw": [["no → file"], ["text.txt"]],
}
"""Entry point -> the arguments of several calls that print something and end: messages, tables, output of --inspect.
MISSING_MODEL is slow because lm-eval reads all its tasks, and NO_DATA because the trainer starts in its own process."""
CALLS = [
    pytest.param(module, words, marks=pytest.mark.slow if words in (MISSING_MODEL, NO_DATA) else ())
    for module, ways in PRINTING.items()
    for words in (["--help"], *ways)
]


def entry_points() -> set[str]:
    """List the modules that can be run by `python -m`."""
    found = set()
    for folder, name in ROOMS.items():
        for path in (ROOT / folder).rglob("*.py"):
            tests = [
                ast.unparse(node.test) for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.If)
            ]
            if path.name == "__main__.py" or any("__main__" in test and "__name__" in test for test in tests):
                found.add(".".join([name, *path.relative_to(ROOT / folder).with_suffix("").parts]))
    return found


def test_every_entry_point_is_tried() -> None:
    assert entry_points() == PRINTING.keys() | NOT_FOR_PEOPLE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the files that the calls name: a corpus, a bad file of prompts, results of benchmarks."""
    folder = tmp_path_factory.mktemp("place → é")
    (folder / "text.txt").write_text("naïve → café ━ 猫, [bold]not markup[/bold] \x1b[31m\n" * 40, encoding="utf-8")
    words = ["--tokenizer", str(tokenizer(folder)), "--out", str(folder / "corpus → é"), "--workers", "1"]
    assert prepare.main([str(folder / "text.txt"), *words]) == 0
    (folder / "prompts → é.jsonl").write_text('{"prompt": "→"}\n{"prompt": 3}\n', encoding="utf-8")
    for name, seconds in ((RESULTS, 1.0), ("slower → é.json", 2.0)):
        rows = [{"name": "phi_fast → é", "seconds": [seconds + i / 1000 for i in range(9)]}]
        document = {"machine": {"device": f"CPU of {name}"}, "subjects": [{"name": "rotary [é] →", "rows": rows}]}
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder


def tokenizer(folder: Path) -> Path:
    """Make a byte-level tokenizer."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def call(module: str, words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[object, str, str]:
    """Run a command with streams in `encoding` (PYTHONIOENCODING); returns exit status, stdout and stderr."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", [module, *words])
        patch.setenv("HF_HUB_OFFLINE", "1")
        entry = importlib.import_module(module)
        try:
            status = entry.main()
        except SystemExit as ended:
            status = ended.code
    for stream in streams.values():
        stream.flush()
    return status or 0, *(stream.buffer.getvalue().decode(encoding) for stream in streams.values())


def told(text: str, encoding: str) -> str:
    """Remove characters that `encoding` lacks, escaped or not, and everything that depends on encoding or time.

    That is seconds, and the lines and spaces of tables, which rich draws in ASCII without box characters.
    """
    text = re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})", "", text)
    text = re.sub(r"; \d+ s\b", "", text).encode(encoding, "ignore").decode(encoding)
    return re.sub(r"[\s|+=-]", "", text)


@pytest.mark.parametrize(
    ("module", "words"), CALLS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_encoding_gives_the_same_status_and_the_same_text(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.chdir(place)
    status, *expected = call(module, words, "utf-8", monkeypatch)
    assert any(expected)
    assert "Traceback" not in expected[1]
    for encoding in ("ascii", "latin-1"):
        again, *found = call(module, words, encoding, monkeypatch)
        assert again == status, encoding
        for before, after in zip(expected, found, strict=True):
            assert told(after, encoding) == told(before, encoding), encoding


def test_the_environment_variable_does_the_same(place: Path) -> None:
    found = {}
    for encoding in ("utf-8", "ascii", "latin-1"):
        command = [sys.executable, "-m", "phi_fast.prepare", "--inspect", "corpus → é"]
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, check=False, timeout=120)
        found[encoding] = done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)
    for encoding in ("ascii", "latin-1"):
        assert found[encoding][0] == found["utf-8"][0] == 0
        assert [told(text, encoding) for text in found[encoding][1:]] == [
            told(text, encoding) for text in found["utf-8"][1:]
        ]


def test_no_module_has_text_read_as_markup() -> None:
    """phi_fast and the benchmarks make consoles only by `phi_fast.terminal`, which supports any encoding.

    The kernels cannot import it and make their own consoles safe.
    """
    found = []
    for folder in ROOMS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path == ROOT / "phi_fast" / "terminal.py":
                continue
            lines = findings(path.read_text(encoding="utf-8"), consoles=folder == "kernels")
            found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import rich.console\nrich.console.Console().print(x)",
        "import rich.console as rc\nrc.Console()",
        "import rich as r\nimport rich.console\nr.console.Console(highlight=False)",
        "from rich import console\nconsole.Console()",
        "from rich.console import Console as Screen\nScreen(markup=False)",
        "from rich.console import Console\nC = Console\nD = C\nD()",
        "from rich.console import Console\nmake = {'a': Console}\nmake['a']()",
        "from rich.console import Console\nfrom functools import partial\npartial(Console, markup=False)()",
        "from rich.console import Console\nConsole(**settings)",
        "from rich.console import Console\nConsole(markup=flag, emoji=False)",
        "from rich.console import *\nConsole()",
        "from .terminal import Console\nConsole()",
        "from .terminal import console\nconsole(markup=True)",
        "screen.print(x, markup=True)",
        "screen.print(x, markup=not plain)",
        "from rich import print\nprint(x)",
        "import rich\nrich.print(x)",
        "from rich.text import Text\nText.from_markup(x)",
        "from rich.markup import render as r\nr(x)",
        "from rich.panel import Panel\nPanel('x', title=x)",
        "from rich.progress import TextColumn\nTextColumn('{task.description}')",
        "import rich.progress as p\np.TextColumn('{task.description}', markup=True)",
        "from rich.progress import Progress\nProgress()",
        "from rich.progress import Progress\nProgress('{task.description}')",
        "from rich.progress import Progress\nProgress(*Progress.get_default_columns())",
        "from rich.progress import track\ntrack(x)",
        "screen.status(f'reading {x}')",
        "from rich.prompt import Prompt\nPrompt.ask(x)",
    ],
)
def test_markup_is_found_under_any_name(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "from rich.console import Console\nConsole(width=8, markup=False, emoji=False)",
        "from rich.console import Console\ndef show(console: Console | None) -> Console: ...",
        "from rich.progress import Progress, TextColumn\nProgress(TextColumn('{task.description}', markup=False))",
        "from rich.text import Text\nscreen.status(Text(x))",
        "from rich.table import Table\nTable(title=x)",
        "from .terminal import console\nconsole(stderr=True).print(x, markup=False)",
    ],
)
def test_what_reads_no_markup_is_left_alone(source: str) -> None:
    assert findings(source) == []


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

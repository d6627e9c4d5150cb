"""A command that finds anything unexpected in place of a user's file ends with a message and status 1 or 2."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import make_source, random_weights

from phi_fast.convert import ConvertOptions, convert

JUNK = bytes(range(256)) * 8
SPOIL: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "binary": lambda path: path.write_bytes(JUNK),
    "utf-16": lambda path: path.write_bytes('{"prompt": "x"}\n'.encode("utf-16")),
    "latin-1": lambda path: path.write_bytes(b'{"prompt": "\xe9"}\n'),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "list": lambda path: path.write_bytes(b"[1]\n"),
    "number": lambda path: path.write_bytes(b"7\n"),
    "object": lambda path: path.write_bytes(b"{}\n"),
    "nested": lambda path: path.write_bytes(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "loop": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "fifo": lambda path: os.mkfifo(path),
}
COMMONEST = ("empty", "folder", "utf-16", "fifo")
"""`make test` tries these; `make test-slow` tries all."""
QUESTION = '{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}\n'
STEP = '{"step": 1, "tokens": 8, "loss": 3.0}\n'
GENERATE = ["phi_fast.generate", "--model", "model", "--max-new-tokens", "2"]
EVALUATE = [
    "phi_fast.evaluate",
    "--model",
    "model",
    "--tasks",
    "piqa",
    "--no-plot",
    "--data",
    "data",
    "--out",
    "results",
]
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
CASES: list[tuple[str, list[str]]] = [
    ("prompts.txt", [*GENERATE, "--file", "prompts.txt"]),
    ("prompts.jsonl", [*GENERATE, "--file", "prompts.jsonl"]),
    *((f"model/{name}", [*GENERATE, "--prompt", "x"]) for name in MODEL_FILES),
    *((f"model/{name}", ["phi_fast.convert", "model", "out", "--to", "phi-msft"]) for name in MODEL_FILES),
    *((f"model/{name}", EVALUATE) for name in MODEL_FILES),
    ("model/model.safetensors.index.json", ["phi_fast.convert", "model", "out", "--to", "phi-msft"]),
    ("model/generation_config.json", ["phi_fast.convert", "model", "out", "--to", "phi-msft"]),
    ("model/tokenizer_config.json", ["phi_fast.convert", "model", "out", "--to", "hf"]),
    ("model/evaluation/results.json", ["phi_fast.convert", "model", "out", "--to", "hf"]),
    ("data/piqa.jsonl", EVALUATE),
    ("results/responses.jsonl", EVALUATE),
    ("results", EVALUATE),
    ("data", EVALUATE),
    ("run/metrics.jsonl", ["phi_fast.report", "run"]),
    ("run/config.json", ["phi_fast.report", "run"]),
    ("run/tensorboard", ["phi_fast.report", "run"]),
    ("run/tensorboard/events.out.tfevents.1", ["phi_fast.report", "run"]),
    ("run/report.html", ["phi_fast.report", "run"]),
    ("page.png", ["phi_fast.report", "run", "--png", "page.png"]),
    ("plan.json", ["phi_fast.plan", "--json", "plan.json"]),
    ("plan.png", ["phi_fast.plan", "--plot", "plan.png"]),
]
TAKES_A_PIPE = {"prompts.txt", "prompts.jsonl", "run/report.html", "page.png", "plan.json", "plan.png"}
"""A read or write of these blocks until the other end of the pipe is closed, which nothing does here."""
NAMES = {
    "NUL": "a\0b",
    "too long": "a" * 300,
    "deep": "a/" * 3000,
    "not UTF-8": "a\udcff",
    "control": "a\x1b[31m\n[/b]",
}
PLACES = [
    [*GENERATE, "--file", "NAME"],
    [*GENERATE, "--file", "prompts.txt", "--out", "NAME/out"],
    ["phi_fast.generate", "--model", "NAME", "--prompt", "x"],
    [*GENERATE, "--prompt", "x", "--tokenizer", "NAME"],
    ["phi_fast.evaluate", "--model", "NAME", "--tasks", "piqa", "--data", "data"],
    [*EVALUATE[:-4], "--data", "NAME", "--out", "results"],
    [*EVALUATE[:-1], "NAME/out"],
    [*EVALUATE, "--tokenizer", "NAME"],
    ["phi_fast.convert", "NAME", "out"],
    ["phi_fast.convert", "model", "NAME"],
    ["phi_fast.convert", "model", "out", "--tokenizer", "NAME"],
    ["phi_fast.report", "NAME"],
    ["phi_fast.report", "run", "--out", "NAME/page.html"],
    ["phi_fast.report", "run", "--png", "NAME/page.png"],
    ["phi_fast.plan", "--json", "NAME/plan.json"],
    ["phi_fast.plan", "--plot", "NAME/plan.png"],
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the table works."""
    place = tmp_path_factory.mktemp("good")
    convert(ConvertOptions(str(make_source(place / "merged", "merged", random_weights())), place / "model"))
    for name, text in (("prompts.txt", "x\n"), ("prompts.jsonl", '{"prompt": "x"}\n')):
        (place / name).write_text(text)
    for folder in ("data", "run/tensorboard"):
        (place / folder).mkdir(parents=True)
    (place / "data/piqa.jsonl").write_text(QUESTION)
    (place / "run/metrics.jsonl").write_text(STEP)
    (place / "run/config.json").write_text('{"seed": 1}')
    return place


def status_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", words)
    try:
        return importlib.import_module(words[0]).main() or 0
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("file", "words", "kind"),
    [
        pytest.param(file, words, kind, marks=() if kind in COMMONEST else pytest.mark.slow)
        for file, words in CASES
        for kind in SPOIL
        if kind != "fifo" or file not in TAKES_A_PIPE
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].rpartition(".")[2],
)
def test_no_file_of_a_user_gives_a_traceback(
    file: str, words: list[str], kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = tmp_path / "place"
    shutil.copytree(good, place)
    monkeypatch.chdir(place)
    path = Path(file)
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    SPOIL[kind](path)
    status = status_of(words, monkeypatch)
    told = capsys.readouterr().err
    assert status in (0, 1, 2)
    assert status == 0 or told.strip()
    assert "Traceback" not in told


@pytest.mark.parametrize("words", {tuple(words): None for _, words in CASES}, ids=" ".join)
def test_the_commands_of_the_table_work_on_good_files(
    words: tuple[str, ...], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    assert status_of(list(words), monkeypatch) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("words", PLACES, ids=lambda words: " ".join(words)[9:])
def test_no_name_of_a_path_gives_a_traceback(
    words: list[str], name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Names with control characters, or not in UTF-8, can be created; the others cannot exist."""
    shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status = status_of([word.replace("NAME", NAMES[name]) for word in words], monkeypatch)
    told = capsys.readouterr().err
    assert status in (0, 1, 2)
    assert status == 2 or name in ("not UTF-8", "control")
    assert status == 0 or told.strip()


def test_what_is_in_the_way_of_results_and_an_empty_file_of_prompts_are_named(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    Path("results").write_text("")
    assert status_of(EVALUATE, monkeypatch) == 2
    assert "--out results is not a folder: name another" in capsys.readouterr().err
    for file in ("prompts.txt", "prompts.jsonl"):
        Path(file).write_text("\n\n")
        assert status_of([*GENERATE, "--file", file], monkeypatch) == 2
        assert f"{file} has no prompts" in capsys.readouterr().err

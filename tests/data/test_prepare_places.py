"""Output folders, names and terminals that users may have: each works, or is refused before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi_fast.data import sequential_rows
from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation import pipeline
from phi_fast.prepare import main

TEXTS = [f"{i} {'lorem ipsum dolor ' * 4}" for i in range(30)]
WIDE = {"COLUMNS": "200", **os.environ}


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def command(*arguments: str | Path | bytes, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phi_fast.prepare", *arguments],
        cwd=cwd,
        env={**WIDE, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=120,
        check=False,
    )


def link_to_empty(folder: Path) -> str:
    (folder / "big").mkdir()
    (folder / "out").symlink_to("big")
    return "out"


def link_to_nothing(folder: Path) -> str:
    (folder / "out").symlink_to("big/corpus")
    return "out"


def fresh_folder(folder: Path) -> str:
    (folder / "out").mkdir()
    return "out"


PLACES: dict[str, Callable[[Path], str | bytes]] = {
    "a link to an empty folder": link_to_empty,
    "a link to nothing": link_to_nothing,
    "an empty folder": fresh_folder,
    "not UTF-8": lambda folder: b"out\xff",
    "markup": lambda folder: "sweep[lr=0.1]",
    "unbalanced markup": lambda folder: "x[/data]",
    "a control character": lambda folder: "a\x1b]0;title\x07b",
}


@pytest.mark.parametrize("place", PLACES)
def test_odd_places_to_write(tmp_path: Path, small_tokenizer: Path, place: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    out = PLACES[place](tmp_path)
    done = command("a.jsonl", "--tokenizer", small_tokenizer, "--workers", "1", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Manifest.read(tmp_path / os.fsdecode(out)).splits["train"].documents == 30
    shown = {"not UTF-8": "out", "a control character": "a\\x1b]0;title\\x07b"}.get(place, out)
    assert f"written: {shown}" in done.stdout  # type: ignore[str-bytes-safe]
    shown = command("--inspect", out, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Document" in shown.stdout or "lorem" in shown.stdout
    ids = np.fromfile(tmp_path / os.fsdecode(out) / "train.bin", "<u2")
    (first, _), *_ = sequential_rows(tmp_path / os.fsdecode(out), "train", 16)
    assert first[0].tolist() == ids[:16].tolist()


def test_into_the_current_directory(tmp_path: Path, small_tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    (tmp_path / "here").mkdir()
    arguments = ("../a.jsonl", "--tokenizer", small_tokenizer, "--workers", "1", "--out", ".")
    done = command(*arguments, cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert Manifest.read(tmp_path / "here").splits["train"].documents == 30
    again = command(*arguments, cwd=tmp_path / "here")
    assert again.returncode == 1
    assert ". exists and is not empty: name another --out" in again.stderr


def test_what_would_fail_at_the_end_is_refused_at_the_start(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    (tmp_path / "file").write_text("x")
    (tmp_path / "to file").symlink_to("file")
    arguments = [str(tmp_path / "a.jsonl"), "--tokenizer", str(small_tokenizer), "--out"]
    monkeypatch.setattr(pipeline, "_encode_all", lambda *_: pytest.fail("work was begun"))
    for out, message in [
        (tmp_path / "file", "exists and is not empty"),
        (tmp_path / "to file", "exists and is not empty"),
        (tmp_path / "file" / "below", "Not a directory"),
        (Path("/proc"), "exists and is not empty"),
    ]:
        assert main([*arguments, str(out)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("length", [60, 120])
def test_a_long_temporary_directory(tmp_path: Path, small_tokenizer: Path, length: int) -> None:
    """The fork server's Unix socket lies in it, and the socket's path may have 107 bytes."""
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    temporary = Path("/tmp") / ("x" * (length - 5 - 7) + f"{os.getpid():07d}")
    temporary.mkdir()
    try:
        done = command(
            *("a.jsonl", "--tokenizer", small_tokenizer, "--workers", "2", "--out", "out"),
            cwd=tmp_path,
            TMPDIR=str(temporary),
        )
    finally:
        subprocess.run(["rm", "-r", str(temporary)], check=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.slow), "latin-1"])
def test_any_encoding_of_the_terminal(tmp_path: Path, small_tokenizer: Path, encoding: str) -> None:
    (tmp_path / "naïve 東京.jsonl").write_text(lines(["naïve 東京 \x1b]0;title\x07"] * 3))
    chosen = ("--tokenizer", small_tokenizer, "--workers", "1", "--validation", "0", "--out", "東京")
    for arguments in (
        ["naïve 東京.jsonl", *chosen],
        ["--inspect", "東京"],
        ["--help"],
        ["gone 東京", *chosen[:-1], "o"],
    ):
        done = command(*arguments, cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == (1 if "gone 東京" in arguments else 0), done.stderr
        assert "Traceback" not in done.stderr
        assert "\x1b]0;title" not in done.stdout  # a document's escapes never reach the terminal
        if "--inspect" in arguments:
            assert "\\x1b]0;title\\x07" in done.stdout

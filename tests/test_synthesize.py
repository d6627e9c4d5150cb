"""The command: options, messages and exit status, a kill at random moments, and this project's own server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("rensa")

from model_folders import make_source, random_weights, tiny_tokenizer
from openai_server import Server, text_of

from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.errors import UsageError
from phi_fast.synthesis import client, duplicates
from phi_fast.synthesize import main
from phi_fast.terminal import console


def options(folder: Path, url: str, *more: str) -> list[str]:
    (folder / "topics.txt").write_text("tides\nbread\n")
    given = f"--topics {folder}/topics.txt --base-url {url} --model m --out {folder}/out --max-tokens-total 100000"
    return [*given.split(), "--max-tokens", "64", *more]


def test_the_command_writes_what_prepare_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pages.jsonl").write_text('{"text": "a page of the web"}\n')
    with Server() as server:
        more = ("--pages", f"{tmp_path}/pages.jsonl", "--styles", "story", "exercises", "--seed", "3")
        assert main(options(tmp_path, server.url, *more)) == 0
    out = capsys.readouterr().out
    assert "all prompts are answered: " in out and "16 documents" in out
    assert all("a page of the web" in request["messages"][0]["content"] for request in server.requests)
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings = Settings(str(tmp_path / "tokenizer.json"), validation=0.0)
    # The folder as a whole: its journal, plan and report are no documents.
    manifest = prepare([tmp_path / "out"], tmp_path / "corpus", settings, workers=1, console=console(quiet=True))
    assert manifest.splits["train"].documents == 16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base-url", "localhost:8000"], "--base-url localhost:8000: expected an address"),
        (["--topics", "absent.txt"], "absent.txt cannot be read: No such file"),
        (["--temperature", "3"], "--temperature 3.0: expected 0 to 2"),
        (["--top-p", "0"], "--top-p 0.0: expected above 0"),
        (["--max-tokens", "0"], "--max-tokens 0: expected at least 1"),
        (["--timeout", "nan"], "--timeout nan: expected a number"),
        (["--retries", "-1"], "--retries -1: expected 0 or more"),
        (["--max-tokens-total", "0"], "--max-tokens-total 0: expected at least 1"),
        (["--styles", "poem"], "--styles poem: expected some of textbook"),
        (["--duplicate-similarity", "0"], "--duplicate-similarity 0.0: expected"),
    ],
)
def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    with Server() as server:
        assert main(options(tmp_path, server.url, *more)) == 2
    assert message in capsys.readouterr().err
    assert not server.requests


def test_a_server_that_fails_gives_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as server:
        pass
    assert main(options(tmp_path, server.url, "--retries", "0")) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert (tmp_path / "out" / "documents.jsonl").read_bytes() == b""


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs openai: pip install 'phi-fast\[synthesize\]'"):
        client.Client(client.Request("http://x", "m"))
    with pytest.raises(UsageError, match=r"needs rensa: pip install 'phi-fast\[synthesize\]'"):
        duplicates.NearDuplicates(0.5)


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    seen = []

    def look(handler, prompt: str, attempt: int) -> bool:
        seen.append(handler.headers["Authorization"])
        return False

    with Server(look) as server:
        assert main(options(tmp_path, server.url, "--api-key-env", "MY_KEY", "--styles", "story")) == 0
    assert set(seen) == {"Bearer secret"}
    for file in (tmp_path / "out").iterdir():
        assert "secret" not in file.read_text("utf-8")


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """Kill -9 the command five times, then let it end: the documents are those of a run without a kill."""

    def slow(handler, prompt: str, attempt: int) -> bool:
        time.sleep(random.uniform(0.02, 0.3))
        return False

    def text(prompt: str) -> str:
        return text_of("one" if "story" in prompt else prompt)

    with Server(text=text) as server:
        (tmp_path / "whole").mkdir()
        assert main(options(tmp_path / "whole", server.url, "--repeats", "2")) == 0
    with Server(slow, text=text) as server:
        command = [sys.executable, "-m", "phi_fast.synthesize"]
        command += options(tmp_path, server.url, "--repeats", "2", "--concurrency", "3")
        journal, kills = tmp_path / "out" / "completions.log", 0
        for _ in range(5):
            had = len(server.answered)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while len(server.answered) < had + 4 and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.3))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert kills == 5
        lines = journal.read_bytes().count(b"\n")
        assert len(server.answered) - 5 * 3 <= lines < 96  # at most what was in flight at a kill was asked again
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{lines} completions of 96 prompts" in done.stdout
    whole = tmp_path / "whole" / "out" / "documents.jsonl"
    assert (tmp_path / "out" / "documents.jsonl").read_bytes() == whole.read_bytes()
    assert len(whole.read_bytes().splitlines()) == 40 + 1


@pytest.mark.slow
def test_this_projects_own_server(tmp_path: Path) -> None:
    """A tiny random model behind `python -m phi_fast.generate --serve` answers both kinds of requests."""
    folder = make_source(tmp_path / "model", "hf", random_weights())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    command = [sys.executable, "-m", "phi_fast.generate", "--model", str(folder), "--serve", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("serving"))
            url = line.split(" at ")[1].split(";")[0]
            for api in ("completions", "chat"):
                (tmp_path / api).mkdir()
                more = ["--api", api, "--model", str(folder), "--styles", "story", "--max-tokens", "8"]
                assert main(options(tmp_path / api, url, *more)) == 0
                report = json.loads((tmp_path / api / "out" / "report.json").read_text("utf-8"))
                assert report["prompts"]["completed"] == 8, report
                assert report["tokens"]["completion"] <= 64
        finally:
            process.kill()

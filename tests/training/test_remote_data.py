"""The trainer on remote corpora: the losses of local ones, and messages for places that it cannot read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from remote_fixtures import no_waits  # noqa: F401
from trainer_processes import losses

from benchmarks.loopback import http_server
from phi_fast.train import INTERRUPTED, main

SMALL = ["--model.hidden-size", "64", "--model.num-attention-heads", "1", "--model.num-hidden-layers", "1"]
SMALL += ["--sequence-length", "32", "--global-batch-size", "4", "--sample-tokens", "0", "--val-every", "4"]
SMALL += ["--val-rows", "4", "--tokens", str(6 * 4 * 32)]


def start(*words: object) -> int:
    return main([*SMALL, *map(str, words)])


def test_remote_corpora_give_the_losses_of_local_ones(stdlib: Path, tmp_path: Path, no_waits: None) -> None:  # noqa: F811
    server = http_server(stdlib)
    failures = iter([None, "drop", None, "short", "error"])
    server.fault = lambda method, path: next(failures, None) if method == "GET" and path.endswith(".bin") else None
    cache = ["--data-cache", tmp_path / "cache", "--data-cache-gb", "0.02"]
    assert start("--data", stdlib, "--run-dir", tmp_path / "local") == 0
    assert start("--data", server.url, "--run-dir", tmp_path / "remote", "--stop-after", 3, *cache) == INTERRUPTED
    assert next(failures, "all") == "all"
    assert main(["--resume", "--run-dir", str(tmp_path / "remote")]) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    remote, local = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("remote", "local"))
    assert [json.loads(line).get("val_losses") for line in remote] == [
        json.loads(line).get("val_losses") for line in local
    ]
    mixed = ["--data", stdlib, "--corpora", f"code={server.url}/code"]
    assert start(*mixed, "--run-dir", tmp_path / "mixed", *cache) == 0
    assert losses(tmp_path / "mixed") == losses(tmp_path / "local")
    server.close()


def test_a_server_that_goes_away_ends_a_run_that_then_goes_on(
    stdlib: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_waits: None,  # noqa: F811
) -> None:
    server, run = http_server(stdlib), tmp_path / "run"
    reads = itertools.count()
    server.fault = lambda method, path: "error" if path.endswith("train.bin") and next(reads) > 30 else None
    words = ["--data", server.url, "--run-dir", run, "--data-cache", tmp_path / "cache", "--tokens", 200 * 4 * 32]
    assert start(*words, "--val-every", 0) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "train.bin, bytes" in message and "could not be read in 8 attempts" in message
    [saved] = (path.name for path in (run / "checkpoints").glob("step-*"))
    server.reset()
    assert main(["--resume", "--run-dir", str(run), "--stop-after", "1"]) == INTERRUPTED
    assert f"stopped at step {int(saved.removeprefix('step-')) + 1} of 200" in capsys.readouterr().out
    server.close()


def test_places_that_cannot_be_read(stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = http_server(tmp_path)
    cache = ["--data-cache", tmp_path / "cache"]
    for words, message in [
        (["--data", f"{server.url}/none", *cache], "none/docs/manifest.json cannot be read"),
        (["--data", stdlib, "--corpora", "web=s3://bucket/web"], "--corpora names web, the mixture has docs, code"),
        (["--data", stdlib, "--corpora", "s3://bucket/web"], "expected NAME=FOLDER or NAME=URL"),
        (
            ["--data", f"{server.url}/none", "--data-cache-gb", "0"],
            "data_cache_gb=0.0: must be gigabytes, greater than",
        ),
    ]:
        assert start(*words, "--run-dir", tmp_path / "run") == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run" / "checkpoints").exists()
    server.close()

"""How long a training step waits for rows from S3, with slow and failing requests, beside the same rows on the disk.

`python -m benchmarks.experiments.remote_data --out benchmarks/results/remote-data.jsonl` serves a corpus of random
tokens with moto's S3 on loopback, in a process of its own, which waits 20 ms before each answer and fails 1% of the
requests (half of them with status 503, half by closing the connection in the middle of the body). `phi_fast.train` then
trains recipe tiny on it, with a cache that holds a quarter of the corpus, and the trainer's metrics say how long each
step waited for rows (`data_wait_ms`). The first steps are left out: before them nothing could be fetched ahead.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.machine import commit, describe_machine
from phi_fast.data import stdlib_corpus, vocabulary
from phi_fast.data.manifest import BLOCK_BYTES, Delimiter, Manifest, Split
from phi_fast.recipes import RECIPES
from phi_fast.startup import tolerate_encodings
from phi_fast.step_records import read_records


@dataclass(frozen=True)
class Options:
    """Measure how long training steps wait for rows from a slow and failing S3."""

    out: Path | None = None
    """Write the figures to this file, as a line of JSON."""
    megabytes: int = 200
    """Size of the corpus, MB."""
    cached: float = 0.25
    """Share of the corpus that the cache holds."""
    delay: float = 0.02
    """Seconds before each answer."""
    failures: float = 0.01
    """Share of requests that fail."""
    steps: int = 60
    """Steps to train."""
    left_out: int = 5
    """First steps that are not counted."""


def write_corpus(data: Path, megabytes: int) -> None:
    """Write corpora `docs` and `code` of random tokens under the standard library's tokenizer, 80% and 20%."""
    stdlib = stdlib_corpus.prepare(Path("data/stdlib"))
    for name, share in (("docs", 0.8), ("code", 0.2)):
        folder = data / name
        folder.mkdir(parents=True)
        ids = np.random.default_rng(len(name)).integers(1, 8192, int(megabytes * share * 5e5)).astype("<u2")
        ids[-1] = 0
        content = ids.tobytes()
        (folder / "train.bin").write_bytes(content)
        (folder / "train.ends").write_bytes(np.array([len(ids)], "<u8").tobytes())
        digests = [
            hashlib.sha256(content[i : i + BLOCK_BYTES]).hexdigest() for i in range(0, len(content), BLOCK_BYTES)
        ]
        split = Split("train.bin", "train.ends", len(ids), 1, int(ids.max()), tuple(digests))
        tokenizer = vocabulary.tokenizer(stdlib[name])
        size = vocabulary.vocab_size(tokenizer)
        digest = vocabulary.digest(tokenizer)
        Manifest("uint16", "stdlib", digest, size, Delimiter(0), {"train": split}).write(folder)
        for place in (folder, data):
            tokenizer.save(str(place / "tokenizer.json"))


def serve(data: Path, delay: float, failures: float) -> None:
    """Serve the corpora in a bucket `data` until stdin ends; prints the address, and at the end what was asked."""
    from benchmarks.loopback import s3_server, upload

    server, draw, failed = s3_server(), random.Random(0), 0
    for name in ("docs", "code"):
        upload(server, data / name, "data", name)
    server.reset()

    def fault(method: str, path: str) -> str | None:
        nonlocal failed
        if draw.random() >= failures:
            return None
        failed += 1
        return draw.choice(["error", "drop"])

    server.delay, server.fault = delay, fault
    print(server.url, flush=True)
    sys.stdin.read()
    print(json.dumps({"requests": len(server.requests), "failed": failed}), flush=True)


def train(data: str, run: Path, steps: int, *words: str, **environment: str) -> list[dict[str, Any]]:
    """Train recipe tiny, and return the records of its steps. Exits with the trainer's status if it fails."""
    tokens = steps * RECIPES["tiny"].tokens_per_step
    command = [sys.executable, "-m", "phi_fast.train", "--data", data, "--run-dir", str(run), "--tokens", str(tokens)]
    command += ["--val-every", "0", "--sample-tokens", "0", "--save-minutes", "0", *words]
    status = subprocess.run(command, env={**os.environ, **environment}).returncode
    if status:
        sys.exit(status)
    return [record for record in read_records(run / "metrics.jsonl") if record["step"]]


def stall(records: list[dict[str, Any]], left_out: int) -> dict[str, float]:
    """Summarise the steps after the first `left_out`."""
    counted = records[left_out:]
    waits, steps = ([record[name] for record in counted] for name in ("data_wait_ms", "step_ms"))
    return {
        "steps": len(counted),
        "step_ms": statistics.median(steps),
        "wait_ms": statistics.median(waits),
        "longest_wait_ms": max(waits),
        "stall_share": sum(waits) / sum(steps),
        "longest_wait_of_first_steps_ms": max(record["data_wait_ms"] for record in records[:left_out]),
    }


def measure(options: Options) -> dict[str, Any]:
    """Train on S3 and on the disk; returns the figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "data", options.megabytes)
        words = [sys.executable, "-m", "benchmarks.experiments.remote_data", "serve"]
        words += [str(folder / "data"), str(options.delay), str(options.failures)]
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        cache = [
            "--data-cache",
            str(folder / "cache"),
            "--data-cache-gb",
            str(options.megabytes * options.cached / 1e3),
        ]
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
        started = time.perf_counter()
        remote = train("s3://data", folder / "remote", options.steps, *cache, AWS_ENDPOINT_URL=url, **keys)
        seconds = time.perf_counter() - started
        asked, _ = server.communicate()
        local = train(str(folder / "data"), folder / "local", options.steps)
        blocks = sum(path.stat().st_blocks * 512 for path in (folder / "cache").glob("*/train.bin"))
    assert [record["loss"] for record in remote] == [record["loss"] for record in local]
    return {
        "machine": describe_machine(),
        "commit": commit(),
        "options": {name: value for name, value in asdict(options).items() if name != "out"},
        "remote": stall(remote, options.left_out),
        "local": stall(local, options.left_out),
        "server": json.loads(asked),
        "run_seconds": seconds,
        "cache_bytes": blocks,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Serve, or measure and print."""
    tolerate_encodings()
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
        return
    options = tyro.cli(Options, prog="python -m benchmarks.experiments.remote_data", description=__doc__)
    for name, least in (("megabytes", 1), ("left_out", 0), ("steps", options.left_out + 1)):
        if getattr(options, name) < least:
            print(f"{name}={getattr(options, name)}: give at least {least}", file=sys.stderr)
            sys.exit(2)
    figures = measure(options)
    print(json.dumps(figures, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

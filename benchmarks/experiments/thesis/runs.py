"""One run of the experiment: `phi_fast.train` on one corpus with one seed, and what the trained model is judged by."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, describe_machine
from phi_fast.config import PhiConfig
from phi_fast.errors import UsageError
from phi_fast.evaluation.perplexity import read_text, score_text
from phi_fast.files import sha256_of, write_atomically
from phi_fast.json_files import read_lines
from phi_fast.step_records import read_records
from phi_fast.terminal import console

from . import exercises
from .corpora import VOCABULARY, Corpora

CONTEXT, ROWS = 512, 4
"""Tokens per row, and rows per step."""
SHAPE = PhiConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    bos_token_id=None,
    eos_token_id=None,
)
"""10.5 M parameters."""
RATE, WARMUP = 6e-3, 20
"""Muon's best learning rate for the recipe `tiny` (docs/optimizers.md), and the steps of its warmup."""
STRIDE = CONTEXT * 3 // 4
"""Tokens by which the window advances over a judged text: all but its first tokens have a quarter of a context before
them, or more."""


@dataclass(frozen=True)
class Plan:
    """What determines the results, apart from the arm and the seed."""

    tokens: int
    """Tokens per run, a multiple of CONTEXT × ROWS."""
    corpora: str
    """Digest of the corpora's summary."""
    exercises: str
    """Digest of the exercises."""

    @staticmethod
    def of(tokens: int, corpora: Corpora) -> Plan:
        """Make the plan. Raises UsageError if `tokens` is below one step, or an arm holds fewer tokens."""
        step = CONTEXT * ROWS
        tokens = tokens // step * step
        if tokens < step:
            raise UsageError(f"--tokens {tokens}: expected at least {step}, one step")
        for arm, facts in corpora.summary["arms"].items():
            if facts["tokens"] < tokens + 2 * CONTEXT:
                raise UsageError(
                    f"--tokens {tokens:,}: the corpus {arm!r} holds {facts['tokens']:,}, and no token is read twice; "
                    "give fewer"
                )
        digest = sha256_of(corpora.folder / "summary.json")
        return Plan(tokens, digest, sha256_of(exercises.FILE))


class Results:
    """The file of finished runs, one JSON object per line."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """Read the file if it exists. Raises UsageError if its runs were made with another plan."""
        self.path, self.plan = path, plan
        self.runs: list[dict[str, Any]] = [value for _, value in read_lines(path)] if path.exists() else []
        if any(run.get("plan") != asdict(plan) for run in self.runs):
            raise UsageError(
                f"{path} holds runs of other corpora, exercises or --tokens: name another --work, or delete the file"
            )

    def has(self, arm: str, seed: int) -> bool:
        return any(run["arm"] == arm and run["seed"] == seed for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Append a run; the file is whole at any moment."""
        self.runs.append(run)
        write_atomically(self.path, "".join(json.dumps(each) + "\n" for each in self.runs).encode())


def train(corpora: Corpora, plan: Plan, arm: str, seed: int, run_dir: Path) -> None:
    """Train one model, or go on with it. Raises UsageError with the trainer's status if it fails."""
    steps = plan.tokens // (CONTEXT * ROWS)
    if (run_dir / "checkpoints" / f"step-{steps}").exists():
        return
    words: list[object] = ["--data", corpora.data(arm), "--mixture", "text=1", "--tokenizer", "data"]
    words += ["--run-dir", run_dir, "--elastic", "--precision", "bf16", "--device", "cpu", "--seed", seed]
    words += ["--tokens", plan.tokens, "--sequence-length", CONTEXT, "--global-batch-size", ROWS]
    words += ["--optimizer", "muon", "--learning-rate", RATE, "--warmup-steps", WARMUP, "--schedule", "linear"]
    words += ["--val-every", 0, "--sample-tokens", 0, "--keep-last", 1, "--log-every", 50]
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        words += [f"--model.{name.replace('_', '-')}", getattr(SHAPE, name)]
    status = subprocess.run([sys.executable, "-m", "phi_fast.train", *map(str, words)]).returncode
    if status:
        raise UsageError(f"{run_dir}: the trainer ended with status {status}; its message is above")


def measure(corpora: Corpora, plan: Plan, arm: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """Judge a trained model: bits per byte on every text, and the exercises. Returns the run's line of the results."""
    from phi_fast.conversion.load import load

    begin = time.monotonic()
    model, tokenizer = load(run_dir, device="cpu", dtype="bf16")
    quiet = console(quiet=True)

    def bits(path: Path) -> float:
        text = read_text(path)
        score = score_text(path, text, model, tokenizer, stride=STRIDE, batch_tokens=4096, console=quiet)
        return score.bits_per_byte

    scores = {group: {name: bits(path) for name, path in corpora.texts(group).items()} for group in ("held_out", "own")}
    outcome = exercises.measure(model, tokenizer, exercises.read(), seed=seed)
    steps = [record for record in read_records(run_dir / "metrics.jsonl") if record["step"]]
    last = [record["loss"] for record in steps[-20:]]
    return {
        "arm": arm,
        "seed": seed,
        "plan": asdict(plan),
        **scores,
        "exercises": asdict(outcome),
        "train_loss": statistics.fmean(last),
        "step_ms": statistics.median(record["step_ms"] for record in steps),
        "judging_seconds": round(time.monotonic() - begin, 1),
        "machine": describe_machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(corpora: Corpora, results: Results, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Train and judge one model, keep its line, and delete its checkpoints."""
    run_dir = work / f"{arm}-seed-{seed}"
    train(corpora, results.plan, arm, seed, run_dir)
    line = measure(corpora, results.plan, arm, seed, run_dir)
    results.add(line)
    shutil.rmtree(run_dir / "checkpoints")  # 150 MB per run
    return line

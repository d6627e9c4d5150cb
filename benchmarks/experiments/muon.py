"""Steps that Muon needs for AdamW's validation loss, with the learning rate of each swept.

`python -m benchmarks.experiments.muon --run-dir runs/muon` trains recipe tiny per optimizer and learning rate, each
run by `phi_fast.train` in its own process, and prints a Markdown table. Runs that are complete are read, not repeated.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from phi_fast.recipes import RECIPES
from phi_fast.startup import tolerate_encodings
from phi_fast.step_records import read_records

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Options:
    """Sweep the learning rates of AdamW and Muon on recipe tiny."""

    run_dir: Path = Path("runs/muon")
    """Folder of the runs, one per optimizer and learning rate."""
    data: Path = RECIPES["tiny"].data
    """Prepared corpora of recipe tiny (`python -m phi_fast.prepare`)."""
    steps: int = RECIPES["tiny"].steps
    """Steps per run."""
    rates: tuple[float, ...] = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
    """Learning rates, the same for both."""
    val_every: int = 20
    """Steps between validation losses: steps to a loss are known to within so many."""


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    optimizer: str
    rate: float
    losses: dict[int, float]
    """Step -> validation loss in nats per token."""
    seconds: float
    """Median duration of a step."""

    @property
    def final(self) -> float:
        return self.losses[max(self.losses)]


def train(options: Options, optimizer: str, rate: float) -> Run:
    """Train, unless that is done, and read the run's metrics. Exits with the trainer's status if that fails."""
    folder = options.run_dir / f"{optimizer}-{rate:g}-{options.steps}"
    if not (folder / "checkpoints" / f"step-{options.steps}").exists():
        recipe = RECIPES["tiny"]
        words = ["--recipe", "tiny", "--data", options.data, "--run-dir", folder, "--elastic"]
        words += ["--optimizer", optimizer, "--learning-rate", rate, "--val-every", options.val_every]
        words += ["--tokens", options.steps * recipe.tokens_per_step, "--sample-tokens", 0]
        status = subprocess.run([sys.executable, "-m", "phi_fast.train", *map(str, words)]).returncode
        if status:
            print(f"{folder}: the trainer ended with status {status}; its message is above", file=sys.stderr)
            sys.exit(status)
    records = read_records(folder / "metrics.jsonl")
    losses = {record["step"]: record["val_loss"] for record in records if record.get("val_loss") is not None}
    return Run(optimizer, rate, losses, statistics.median(r["step_ms"] / 1000 for r in records if r["step"]))


def steps_to(run: Run, loss: float) -> int | None:
    """Return the first validated step whose loss is at most `loss`; None if there is none."""
    return next((step for step, reached in sorted(run.losses.items()) if reached <= loss), None)


def table(runs: list[Run]) -> str:
    """Make the report: each run, and Muon's steps to the best final loss of AdamW, with the ratio of step times."""
    adamw = min((run for run in runs if run.optimizer == "adamw"), key=lambda run: run.final)
    lines = [
        "| optimizer | learning rate | final loss | steps to AdamW's best | step ÷ AdamW's |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        steps = steps_to(run, adamw.final)
        shown = "not reached" if steps is None else f"{steps} of {max(adamw.losses)}"
        ratio = run.seconds / adamw.seconds
        lines.append(f"| {run.optimizer} | {run.rate:g} | {run.final:.4f} | {shown} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the sweep."""
    tolerate_encodings()
    options = tyro.cli(Options, prog="python -m benchmarks.experiments.muon")
    for name, given in (("steps", options.steps), ("val_every", options.val_every), ("rates", len(options.rates))):
        if given < 1:
            print(f"{name}={getattr(options, name)}: give at least 1", file=sys.stderr)
            sys.exit(2)
    print(table([train(options, optimizer, rate) for optimizer in OPTIMIZERS for rate in options.rates]))


if __name__ == "__main__":
    main()

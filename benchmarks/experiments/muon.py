"""Steps that Muon needs for AdamW's validation loss, with the learning rate of each swept.

`python -m benchmarks.experiments.muon --run-dir runs/muon` trains recipe tiny per optimizer and learning rate, each
run by `phi_fast.train` in its own process, then the best rate of each with more seeds, and prints Markdown tables. Both
optimizers see the same tokens in the same order, from the same weights. Runs that are complete are read, not repeated,
so that a sweep that was stopped goes on, and more rates may be added.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    seeds: tuple[int, ...] = (1337, 1338, 1339)
    """Seeds of weights and data order: the sweep has the first, the best rate of each optimizer all of them."""
    results: Path | None = None
    """Write every run as a line of JSON to this file, after each run."""
    val_every: int = 20
    """Steps between validation losses: steps to a loss are known to within so many."""


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    optimizer: str
    rate: float
    seed: int
    losses: dict[int, float]
    """Step -> validation loss in nats per token."""
    seconds: float
    """Median duration of a step."""

    @property
    def final(self) -> float:
        return self.losses[max(self.losses)]


def train(options: Options, optimizer: str, rate: float, seed: int) -> Run:
    """Train, unless that is done, and read the run's metrics. Exits with the trainer's status if that fails."""
    folder = options.run_dir / f"{optimizer}-{rate:g}-seed-{seed}-{options.steps}"
    if not (folder / "checkpoints" / f"step-{options.steps}").exists():
        recipe = RECIPES["tiny"]
        words = ["--recipe", "tiny", "--data", options.data, "--run-dir", folder, "--elastic"]
        words += ["--optimizer", optimizer, "--learning-rate", rate, "--seed", seed, "--val-every", options.val_every]
        words += ["--tokens", options.steps * recipe.tokens_per_step, "--sample-tokens", 0]
        status = subprocess.run([sys.executable, "-m", "phi_fast.train", *map(str, words)]).returncode
        if status:
            print(f"{folder}: the trainer ended with status {status}; its message is above", file=sys.stderr)
            sys.exit(status)
    records = read_records(folder / "metrics.jsonl")
    losses = {record["step"]: record["val_loss"] for record in records if record.get("val_loss") is not None}
    return Run(optimizer, rate, seed, losses, statistics.median(r["step_ms"] / 1000 for r in records if r["step"]))


def sweep(options: Options) -> list[Run]:
    """Train every rate with the first seed, then the best rate of each optimizer with the others."""
    runs: list[Run] = []

    def add(optimizer: str, rate: float, seed: int) -> None:
        runs.append(train(options, optimizer, rate, seed))
        if options.results:
            options.results.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))

    first, *others = options.seeds
    for optimizer in OPTIMIZERS:
        for rate in options.rates:
            add(optimizer, rate, first)
    for optimizer in OPTIMIZERS:
        rate = best(runs, optimizer).rate
        for seed in others:
            add(optimizer, rate, seed)
    return runs


def best(runs: Sequence[Run], optimizer: str) -> Run:
    """Return the optimizer's run with the smallest final loss."""
    return min((run for run in runs if run.optimizer == optimizer), key=lambda run: run.final)


def steps_to(run: Run, loss: float) -> int | None:
    """Return the first validated step whose loss is at most `loss`; None if there is none."""
    return next((step for step, reached in sorted(run.losses.items()) if reached <= loss), None)


def table(runs: Sequence[Run]) -> str:
    """Make the report: each run of one seed, with its steps to the best final loss of AdamW."""
    adamw = best(runs, "adamw")
    lines = [
        "| optimizer | learning rate | final loss | steps to AdamW's best | step ÷ AdamW's |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        steps = steps_to(run, adamw.final)
        shown = "not reached" if steps is None else f"{steps} of {max(adamw.losses)}"
        ratio = run.seconds / adamw.seconds
        lines.append(f"| {run.optimizer} | {run.rate:g} | {run.final:.4f} | {shown} | {ratio:.2f} |")
    for optimizer in OPTIMIZERS:
        rates = sorted(run.rate for run in runs if run.optimizer == optimizer)
        if best(runs, optimizer).rate in (rates[0], rates[-1]):
            lines += ["", f"The best rate of {optimizer}, {best(runs, optimizer).rate:g}, is at an edge: add --rates."]
    return "\n".join(lines)


def spread(runs: Sequence[Run]) -> str:
    """Make the table of the seeds, at the rate of each optimizer that was best with the first seed."""
    first = runs[0].seed
    of_first = [run for run in runs if run.seed == first]
    rates = {optimizer: best(of_first, optimizer).rate for optimizer in OPTIMIZERS}
    lines = ["| seed | AdamW's final loss | Muon's | Muon's steps to AdamW's |", "|---|---|---|---|"]
    for seed in dict.fromkeys(run.seed for run in runs):
        adamw, muon = (
            next(run for run in runs if (run.optimizer, run.rate, run.seed) == (name, rates[name], seed))
            for name in OPTIMIZERS
        )
        lines.append(f"| {seed} | {adamw.final:.4f} | {muon.final:.4f} | {steps_to(muon, adamw.final)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the sweep."""
    tolerate_encodings()
    options = tyro.cli(Options, prog="python -m benchmarks.experiments.muon")
    counts = {"steps": options.steps, "val_every": options.val_every}
    for name, given in (counts | {name: len(getattr(options, name)) for name in ("rates", "seeds")}).items():
        if given < 1:
            print(f"{name}={getattr(options, name)}: give at least 1", file=sys.stderr)
            sys.exit(2)
    runs = sweep(options)
    print(table([run for run in runs if run.seed == options.seeds[0]]), spread(runs), sep="\n\n")


if __name__ == "__main__":
    main()

"""The sweep of Muon's and AdamW's learning rates: what it trains, and what it makes of the losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.experiments import muon
from benchmarks.experiments.muon import Options, Run


def run(optimizer: str, rate: float, final: float, seed: int = 1, early: float = 9.0) -> Run:
    return Run(optimizer, rate, seed, {0: 9.0, 20: early, 40: final}, 0.5 if optimizer == "adamw" else 0.75)


RUNS = [
    *(run("adamw", rate, loss) for rate, loss in ((1e-3, 6.0), (2e-3, 5.0), (4e-3, 5.5))),
    *(run("muon", rate, loss, early=early) for rate, loss, early in ((1e-3, 5.1, 8), (2e-3, 4.5, 5), (4e-3, 4.0, 7))),
]


def test_steps_are_counted_to_adamws_best_loss() -> None:
    lines = muon.table(RUNS).splitlines()
    assert lines[2] == "| adamw | 0.001 | 6.0000 | not reached | 1.00 |"
    assert lines[3] == "| adamw | 0.002 | 5.0000 | 40 of 40 | 1.00 |"
    assert lines[6] == "| muon | 0.002 | 4.5000 | 20 of 40 | 1.50 |"
    assert lines[7] == "| muon | 0.004 | 4.0000 | 40 of 40 | 1.50 |"


def test_a_best_rate_at_an_edge_is_named() -> None:
    assert muon.table(RUNS).splitlines()[8:] == ["", "The best rate of muon, 0.004, is at an edge: add --rates."]


def test_seeds_are_compared_at_the_best_rates() -> None:
    more = [*RUNS, run("adamw", 2e-3, 5.2, seed=2), run("muon", 4e-3, 4.1, seed=2, early=5.1)]
    assert muon.spread(more).splitlines()[2:] == ["| 1 | 5.0000 | 4.0000 | 40 |", "| 2 | 5.2000 | 4.1000 | 20 |"]


def test_the_sweep_trains_rates_with_one_seed_and_the_best_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "train", lambda _, optimizer, rate, seed: run(optimizer, rate, abs(rate - 2), seed))
    options = Options(rates=(1.0, 2.0, 4.0), seeds=(7, 8), results=tmp_path / "muon.jsonl")
    found = muon.sweep(options)
    swept = [(name, rate, 7) for name in ("adamw", "muon") for rate in (1.0, 2.0, 4.0)]
    assert [(x.optimizer, x.rate, x.seed) for x in found] == [*swept, ("adamw", 2.0, 8), ("muon", 2.0, 8)]
    lines = (tmp_path / "muon.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [7] * 6 + [8] * 2


def test_complete_runs_are_read_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon.subprocess, "run", lambda _: pytest.fail("trained again"))
    folder = tmp_path / "adamw-0.003-seed-5-2"
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    records = [{"step": 0, "val_loss": 9.0}, {"step": 1, "step_ms": 3.0}, {"step": 2, "step_ms": 5.0, "val_loss": 8.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = muon.train(Options(run_dir=tmp_path, steps=2), "adamw", 3e-3, 5)
    assert found == Run("adamw", 3e-3, 5, {0: 9.0, 2: 8.0}, 0.004)

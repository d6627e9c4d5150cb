"""Speed, memory and quality of `phi_fast.curate` on a corpus whose duplicates and contamination are known.

`python -m benchmarks.experiments.curation --megabytes 200 --folder runs/curation` makes the corpus, runs every step by
the command, with one worker, beside datatrove's own steps in the same run, and prints Markdown tables. Rates are
megabytes of text per second of processor time, so that other work on the machine changes them less. Steps that are
done are read, not repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import tyro

from benchmarks.experiments.curation_corpus import Planted, make
from phi_fast.startup import tolerate_encodings

BINS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Borders of the similarities for which recall is given."""


@dataclass(frozen=True)
class Options:
    """Measure the steps of `phi_fast.curate`."""

    megabytes: float = 200
    """Size of the corpus's texts."""
    folder: Path = Path("runs/curation")
    """Folder of the corpus, the outputs and the results."""
    seed: int = 0
    """Seed of the corpus."""
    peers: bool = True
    """Run datatrove's steps, too."""
    rules: bool = True
    """Measure the rules, too, which take the longest by far."""


@dataclass(frozen=True)
class Cost:
    """Time and memory of one process."""

    name: str
    megabytes: float
    wall: float
    """Seconds."""
    processor: float
    """Seconds, user and system."""
    peak: float
    """Resident memory, MB."""

    @property
    def rate(self) -> float:
        return self.megabytes / self.processor


def measure(name: str, command: Sequence[str], megabytes: float, folder: Path) -> Cost:
    """Run a command in its own process, unless it was measured before. Exits if it fails."""
    record = folder / f"{name.replace(' ', '-')}.cost.json"
    if record.exists():
        return Cost(**json.loads(record.read_text()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    clock = os.times()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"{' '.join(command)} ended with status {process.returncode}; its message is above", file=sys.stderr)
        sys.exit(1)
    wall = os.times().elapsed - clock.elapsed
    cost = Cost(name, megabytes, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)
    record.write_text(json.dumps(asdict(cost)))
    return cost


def dropped(out: Path) -> dict[str, dict[str, object]]:
    """Read which documents a step dropped, by id."""
    lines = (out / "dropped.log").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def run(options: Options) -> tuple[list[Cost], str]:
    """Run every step. Returns the costs, and the tables about quality."""
    folder = options.folder / f"{options.megabytes:g}-MB-seed-{options.seed}"
    planted = make(folder, options.megabytes, options.seed)
    corpus, size = folder / "corpus.jsonl.zst", planted.bytes / 1e6
    curate = [sys.executable, "-m", "phi_fast.curate"]
    costs = []
    more: dict[str, list[str]] = {
        "exact-dedup": [],
        "near-dedup": [],
        "decontaminate": ["--benchmarks", str(folder / "benchmark.jsonl")],
        "rules": ["--rules", "gopher-quality", "gopher-repetition"],
    }
    if not options.rules:
        del more["rules"]
    for step, words in more.items():
        rest = [str(corpus), "--out", str(folder / step), "--workers", "1", "--skip-malformed", *words]
        costs.append(measure(step, [*curate, step, *rest], size, folder))
        if options.peers and step != "decontaminate":  # datatrove's needs lighteval
            peer = [sys.executable, "-m", "benchmarks.experiments.curation_peers", step]
            out = folder / f"datatrove-{step}"
            costs.append(measure(f"datatrove {step}", [*peer, str(well_formed(folder)), str(out)], size, folder))
    return costs, quality(folder, planted)


def well_formed(folder: Path) -> Path:
    """Write the corpus without its malformed records, which end datatrove's reader of a file."""
    import zstandard

    path = folder / "well-formed.jsonl.zst"
    if not path.exists():
        temporary = folder / "well-formed.partial"
        with (
            zstandard.open(folder / "corpus.jsonl.zst", "rt", encoding="utf-8") as source,
            zstandard.open(temporary, "wt", encoding="utf-8") as out,
        ):
            for line in source:
                if line.startswith('{"text": "') and line.endswith('"}\n') and "\\ud800" not in line:
                    out.write(line)
        temporary.rename(path)
    return path


def quality(folder: Path, planted: Planted) -> str:
    """Compare what was dropped with what was planted."""
    lines = ["| planted | found | of | also dropped, not planted |", "|---|---|---|---|"]
    exact = dropped(folder / "exact-dedup")
    found = sum(
        exact.get(name, {}).get("repeats") in _family(planted, original) for name, original in planted.exact.items()
    )
    lines.append(
        f"| exact duplicates | {found:,} | {len(planted.exact):,} | {len(exact.keys() - planted.exact.keys()):,} |"
    )
    clean = dropped(folder / "decontaminate")
    reasons = {"texts": "benchmark n-gram", "programs": "benchmark syntax"}
    # A copy of a contaminated document is contaminated, too; contaminated ones are not copied.
    contaminated = {*planted.texts, *planted.programs}
    for part, reason in reasons.items():
        names = getattr(planted, part)
        false = [name for name, record in clean.items() if record["reason"] == reason and name not in contaminated]
        lines.append(f"| {reason} | {sum(name in clean for name in names):,} | {len(names):,} | {len(false):,} |")
    near = dropped(folder / "near-dedup")
    strangers = near.keys() - planted.near.keys() - planted.exact.keys()
    right = sum(name in planted.exact or planted.near[name][1] >= 0.7 for name in near.keys() - strangers)
    lines += [
        "",
        f"Near duplicates: {len(near):,} dropped, {len(strangers):,} of them not planted; precision at an exact",
    ]
    lines.append(f"similarity of at least 0.7: {right / max(len(near), 1):.4f}.")
    lines += ["", "| exact similarity | planted | dropped | recall |", "|---|---|---|---|"]
    for low, high in pairwise(BINS):
        names = [name for name, (_, similarity) in planted.near.items() if low <= similarity < high]
        count = sum(name in near for name in names)
        share = f"{count / len(names):.3f}" if names else "none planted"
        lines.append(f"| {low:g} to {high:g} | {len(names):,} | {count:,} | {share} |")
    report = json.loads((folder / "exact-dedup" / "report.json").read_text())
    lines += ["", f"Malformed records: {report['counts']['malformed']:,} counted of {planted.malformed:,} planted."]
    return "\n".join(lines)


def _family(planted: Planted, name: str) -> set[str]:
    """The original of a copy of a copy, too."""
    names = {name}
    while name in planted.exact:
        name = planted.exact[name]
        names.add(name)
    return names


def table(costs: Sequence[Cost]) -> str:
    """Make the table of speed and memory."""
    lines = ["| step | MB/s per core | processor s | wall s | peak MB |", "|---|---|---|---|---|"]
    for cost in costs:
        lines.append(f"| {cost.name} | {cost.rate:.2f} | {cost.processor:.0f} | {cost.wall:.0f} | {cost.peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the measurements."""
    tolerate_encodings()
    options = tyro.cli(Options, prog="python -m benchmarks.experiments.curation")
    if options.megabytes <= 0:
        print(f"megabytes={options.megabytes}: give more than 0", file=sys.stderr)
        sys.exit(2)
    costs, found = run(options)
    print(table(costs), found, sep="\n\n")


if __name__ == "__main__":
    main()

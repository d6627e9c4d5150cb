"""phi's thesis on two cores: raw text against filtered text against books, at equal tokens and equal model.

`python -m benchmarks.experiments.textbooks` downloads the corpora's packages, makes the corpora, trains and judges a
10 M model per corpus and seed, and writes the results into docs/textbooks.md, which says what is compared and why.
Whatever is complete is read, not repeated: the same command goes on where it was stopped. `--quick` tries all of it in
a few minutes, with results that mean nothing. Needs Debian's apt-get, dpkg-deb and groff, and
`pip install 'phi-fast[textbooks]'`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("benchmarks.experiments.textbooks")

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.experiments.thesis import page, runs
from benchmarks.experiments.thesis.corpora import ARMS, build
from benchmarks.experiments.thesis.packages import fetch, pinned
from phi_fast.errors import PhiFastError
from phi_fast.evaluation import sandbox
from phi_fast.startup import tolerate_encodings
from phi_fast.terminal import console

TOKENS, QUICK_TOKENS = 512_000, 20_480
SEEDS, QUICK_SEEDS = (1, 2, 3, 4, 5), (1, 2)


@dataclass(frozen=True)
class Options:
    """Compare raw text, filtered text and books."""

    data: Path = Path("data/textbooks")
    """Folder of the downloaded packages and of the corpora."""
    work: Path = Path("runs/textbooks")
    """Folder of the runs."""
    tokens: int | None = None
    """Tokens per run. Default: 512,000, or 20,480 with --quick."""
    seeds: tuple[int, ...] | None = None
    """Seeds of weights and data order. Default: 1 2 3 4 5, or 1 2 with --quick."""
    quick: bool = False
    """Try the whole experiment in a few minutes. Its results mean nothing, and are not written into the docs."""
    until: Literal["packages", "corpora", "runs", "page"] = "page"
    """Stop after this part."""
    results: Path | None = None
    """The runs, one JSON object per line. Default: benchmarks/results/textbooks.jsonl, or WORK/results.jsonl with
    --quick."""
    page: Path | None = None
    """The page whose results are written anew. Default: docs/textbooks.md; with --quick WORK/textbooks.md."""


def experiment(options: Options) -> None:
    """Carry out the parts that the options ask for. Raises PhiFastError or SandboxError if one cannot be done."""
    output = console(soft_wrap=True)
    packages = options.data / "packages"
    fetch(pinned(), packages)
    if options.until == "packages":
        return
    corpora = build(packages, options.data / "corpora", output)
    for arm, facts in corpora.summary["arms"].items():
        output.print(f"{arm}: {facts['documents']:,} documents, {facts['bytes']:,} bytes, {facts['tokens']:,} tokens")
    if options.until == "corpora":
        return
    sandbox.check()
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    plan = runs.Plan.of(tokens, corpora)
    work = options.work / ("quick" if options.quick else f"{plan.tokens}")
    work.mkdir(parents=True, exist_ok=True)
    results_file = options.results or (work / "results.jsonl" if options.quick else page.RESULTS)
    results = runs.Results(results_file, plan)
    left = [(arm, seed) for seed in seeds for arm in ARMS if not results.has(arm, seed)]
    for number, (arm, seed) in enumerate(left, 1):
        begin = time.monotonic()
        line = runs.run(corpora, results, arm, seed, work)
        mean = sum(line["held_out"].values()) / len(line["held_out"])
        took = time.monotonic() - begin
        output.print(f"run {number} of {len(left)}: {arm}, seed {seed}: {mean:.4f} bits per byte, {took:.0f} s")
    if options.until == "runs":
        return
    place = options.page or (work / "textbooks.md" if options.quick else page.PAGE)
    page.write(place, results.runs, corpora.summary)
    output.print(f"written: {results_file}, {place}")


def main() -> int:
    """Run the command; returns its exit status: 0, 2 after an error, 130 after Ctrl-C."""
    tolerate_encodings()
    options = tyro.cli(Options, prog="python -m benchmarks.experiments.textbooks", description=__doc__)
    if options.tokens is not None and options.tokens < 1:
        print(f"--tokens {options.tokens}: give at least 1", file=sys.stderr)
        return 2
    if options.seeds is not None and len(set(options.seeds)) < max(2, len(options.seeds)):
        print(f"--seeds {options.seeds}: give at least 2, all different, for an interval", file=sys.stderr)
        return 2
    try:
        experiment(options)
    except (PhiFastError, sandbox.SandboxError, OSError) as error:
        print(f"textbooks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntextbooks: stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs all campaigns in turn, each in its own process with a time budget: `make attack ARGS="--minutes 10"`.

Prints a table with each campaign's target and number of attacks, which is smaller if the budget ended first. The exit
status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .tally import Counts

ROOT = Path(__file__).parent.parent.parent
FOLDERS = [ROOT / "tests" / part for part in ("", "data", "evaluation", "training")]
"""The folders from which the tests' helpers are imported."""
GRACE_SECONDS = 300.0
"""Time beyond a campaign's budget, for its start, its last attack and its clean-up. It ends by itself at its budget."""
BUILD_SECONDS = 1200.0
"""Additional time for the C++ under AddressSanitizer."""
KEPT_OUTPUT = 4000
MINUTES = 60.0


@dataclass(frozen=True)
class Campaign:
    """One kind of attack."""

    name: str
    what: str
    target: int
    """Number of attacks; 0: all possible ones."""
    share: float
    """Share of the total time."""


CAMPAIGNS = (
    Campaign("kills", "kill -9 of a run, then resumed", 1000, 0.5),
    Campaign("flips", "single-bit flips of a manifest", 0, 0.05),
    Campaign("headers", "damaged headers", 1_000_000, 0.25),
    Campaign("programs", "hostile programs in the sandbox", 201, 0.1),
    Campaign("ops", "op calls", 9000, 0.1),
)
FLIPS = 5000
"""About as many bits as a manifest has."""


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # also ends the running campaign
    names = options.only or [campaign.name for campaign in CAMPAIGNS]
    print(f"seed {options.seed} (--seed), {options.minutes:g} minutes, scale {options.scale:g}", flush=True)
    print(f"{'campaign':<10}{'done':>10}{'target':>10}{'failures':>10}{'seconds':>9}", flush=True)
    failures: list[str] = []
    for campaign in (campaign for campaign in CAMPAIGNS if campaign.name in names):
        began = time.monotonic()
        counts = run(campaign, options)
        row = f"{campaign.name:<10}{counts.done:>10,}{counts.target:>10,}{len(counts.failures):>10}"
        short = counts.done < counts.target
        print(f"{row}{time.monotonic() - began:>9.0f}{'  ended before its target' * short}", flush=True)
        failures += [f"{campaign.name}: {failure}" for failure in counts.failures]
    for failure in failures:
        print(failure[:KEPT_OUTPUT])
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("make attack", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all campaigns together")
    parser.add_argument("--scale", type=float, default=1.0, help="part of each target")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--only", nargs="+", choices=[campaign.name for campaign in CAMPAIGNS])
    parser.add_argument("--no-sanitizer", action="store_true", help="ops on the installed extension: only crashes show")
    return parser.parse_args()


def run(campaign: Campaign, options: argparse.Namespace) -> Counts:
    """Run one campaign until it or its budget ends. Processes that it leaves are killed."""
    seconds = 60 * options.minutes * campaign.share
    target = campaign.target if options.scale == 1 else max(1, round((campaign.target or FLIPS) * options.scale))
    with tempfile.TemporaryDirectory(prefix="phi-fast-attack-") as folder:
        file, output = Path(folder) / "counts.json", Path(folder) / "output"
        arguments = ["-m", "attack.one", campaign.name, str(target), str(seconds), str(options.seed), str(file)]
        sanitized = campaign.name == "ops" and not options.no_sanitizer
        command = ["sh", "csrc/cpu/sanitize.sh", *arguments] if sanitized else [sys.executable, *arguments]
        environment = os.environ | {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        with output.open("wb") as written:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=written, stderr=written, start_new_session=True
            )
        try:
            status: int | None = process.wait(seconds + GRACE_SECONDS + BUILD_SECONDS * sanitized)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_session(process)
        counts = Counts(**json.loads(file.read_text())) if file.exists() else Counts(target)
        if status != 0:
            how = f"did not end within {seconds + GRACE_SECONDS:.0f} s" if status is None else f"ended with {status}"
            counts.failures.append(f"after {counts.done:,} the process {how}: {shown(output)}")
        return counts


def shown(output: Path) -> str:
    """The sanitizer's report, or else the end of the output."""
    text = output.read_text(errors="replace")
    start = max(text.find("==ERROR: AddressSanitizer"), text.find(": runtime error: "))
    return text[start : start + KEPT_OUTPUT // 2] if start >= 0 else text[-KEPT_OUTPUT // 2 :]


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all processes of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # no process was left
    finally:
        process.wait()


if __name__ == "__main__":
    sys.exit(main())

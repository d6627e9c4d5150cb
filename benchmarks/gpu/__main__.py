"""`make gpu`, or python -m benchmarks.gpu: everything that users will ask of a GPU, within a budget, most important
first.

benchmarks/results/DEVICE-DATE.json is written after every result, and docs/gpu-DEVICE.md after every stage.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import machine
from benchmarks.gpu.day import NOT_MEASURED, Day, unused
from benchmarks.gpu.page import page, predictions
from benchmarks.gpu.place import describe
from benchmarks.gpu.predicted import predicted
from benchmarks.gpu.runner import run
from benchmarks.gpu.stages import stages
from benchmarks.harness import RESULTS
from phi_fast.errors import UsageError
from phi_fast.files import write_atomically
from phi_fast.startup import tolerate_encodings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """Prove and measure this project on the machine's GPU."""

    budget: float = 600.0
    """Seconds until the last stage is stopped."""
    dry: bool = False
    """Run the whole script on a CPU at toy sizes; written to build/gpu-dry, never to benchmarks/results."""
    only: tuple[str, ...] = ()
    """Names of the stages to run; none: all."""
    began: float | None = None
    """When the budget began, in seconds since the epoch. Default: now."""
    commit: str = "unknown"
    """The commit that is measured, where no git can say so."""

    def check(self) -> None:
        """Raises UsageError, naming the option, its value and the way out."""
        if not 0 < self.budget < 1e6:
            raise UsageError(f"--budget {self.budget:g}: expected seconds, greater than 0")
        known = [stage.name for stage in stages()]
        if unknown := [name for name in self.only if name not in known]:
            raise UsageError(f"--only {' '.join(unknown)}: the stages are {', '.join(known)}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0 after the day, whatever the stages found; 2 where it could not begin."""
    tolerate_encodings()
    # torch asks the driver's library whether there is a GPU, not CUDA, which no fork could use after that.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.gpu", description=__doc__)
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no GPU is touched by a dry run, where there is one
    now = time.time()
    began = time.monotonic() - (now - (options.began or now))
    try:
        options.check()
        day = begin(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [stage for stage in stages() if stage.name in (options.only or {stage.name})]
    written = page_of(day)

    def tell(line: str) -> None:
        print(line, flush=True)
        write_atomically(written, page(day.document).encode())

    with tempfile.TemporaryDirectory(prefix="phi-fast-gpu-", ignore_cleanup_errors=True) as scratch:
        run(chosen, day, budget=options.budget, began=began, scratch=Path(scratch), dry=options.dry, tell=tell)
    for name, expected, measured in predictions(day.document):
        print(f"{name}: measured ÷ predicted {NOT_MEASURED if measured is None else f'{measured / expected:.2f}'}")
    tell(f"[{time.monotonic() - began:4.0f} s] wrote {day.path} and {written}")
    return 0


def begin(options: Options) -> Day:
    """The day's file, with everything that is known before the first stage. Raises UsageError without a GPU."""
    here = describe(options.dry)
    if here["gpu"] is None and not options.dry:
        raise UsageError(
            "torch sees no GPU here: install a CUDA build of torch on a machine that has one, or try the script at toy "
            "sizes with make gpu DRY=1"
        )
    head = {
        "machine": here,
        "commit": options.commit if machine.commit() == "unknown" else machine.commit(),
        "dry": options.dry,
        "budget_s": options.budget,
        "predicted": None if options.dry else predicted(here["device"]),
    }
    directory = ROOT / "build" / "gpu-dry" if options.dry else RESULTS
    path = unused(directory, f"{machine.slug(here)}-{time.strftime('%Y-%m-%d')}")
    return Day(path, head, [(stage.name, stage.title) for stage in stages()])


def page_of(day: Day) -> Path:
    """Path of the page of a results file: beside it after a dry run, else docs/gpu-DEVICE.md."""
    if day.document["dry"]:
        return day.path.with_suffix(".md")
    return ROOT / "docs" / f"gpu-{machine.slug(day.document['machine'])}.md"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running stage ends too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

"""`python -m phi_fast.report RUN [RUN…]`: one self-contained HTML page about a run, or about several side by side."""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.report")

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .errors import PhiFastError, UsageError
from .files import check_names
from .reporting.page import page
from .reporting.read import read_runs
from .startup import tolerate_encodings
from .terminal import console


@dataclass(frozen=True)
class Options:
    """Report on runs: loss, validation, gradient norm, loss scale, throughput, mixture, samples, configurations."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories that phi_fast.train wrote; several are drawn side by side."""
    out: Path | None = None
    """File for the page. Default: report.html in the run's directory; for several, report-NAME-NAME.html beside the
    first."""
    png: Path | None = None
    """Draw the curves into this PNG too (needs matplotlib)."""


def run(options: Options) -> Path:
    """Write the page, and the picture if --png is given. Returns the page's path; raises UsageError."""
    if not options.runs:
        raise UsageError("give at least one run directory, as in: python -m phi_fast.report runs/tiny")
    check_names(options)
    found = read_runs(list(options.runs))
    out = options.out or _default_page(options.runs)
    out.write_text(page(found), encoding="utf-8")
    if options.png is not None:
        from .reporting.picture import draw

        draw(found, options.png)
    return out


def _default_page(runs: tuple[Path, ...]) -> Path:
    """Choose the page's path: inside a single run, or beside the first of several runs."""
    if len(runs) == 1:
        return runs[0] / "report.html"
    names = "-".join(run.resolve().name for run in runs)
    return runs[0].resolve().parent / f"report-{names[:150]}.html"


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line."""
    return tyro.cli(Options, args=arguments, prog="python -m phi_fast.report", description=__doc__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    tolerate_encodings()
    options = parse(arguments)
    try:
        out = run(options)
    except ImportError as error:
        print(f"error: --png needs matplotlib: pip install 'phi-fast[eval]' ({error})", file=sys.stderr)
        return 2
    except (PhiFastError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console(soft_wrap=True).print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

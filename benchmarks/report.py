"""`python -m benchmarks.report` writes docs/benchmarks.md, its plots and the README's picture from results files.

`--compare A.json B.json` instead prints what became slower from A to B, and exits with 1 if anything did.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import overview, plots, regressions, summary
from benchmarks.harness import RESULTS, whole
from benchmarks.tables import cells, describe, markdown
from phi_fast.errors import UsageError
from phi_fast.json_files import read_json
from phi_fast.startup import tolerate_encodings
from phi_fast.terminal import console

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
TITLE = "# Benchmarks\n\nWritten by `python -m benchmarks.report` from `benchmarks/results/`; do not edit."
HOW = """Times are medians. All rows of a table are timed in turn, round by round. "Spread" is the interquartile range ÷
the median. "× phi_fast" is the time as a multiple of the first phi_fast row's time, from the ratios of each round. "Of
bound" is the least possible time ÷ the median: the longer of the times that the operation's bytes and its FLOPs take at
the rates of the copy and of the matrix product, timed in the same rounds. Half of what a copy moves is writes, and a
processor reads memory before it writes it, so an operation that writes less can exceed 100%. A row that did not run
says why."""


@dataclass(frozen=True)
class Options:
    """What to do with results files."""

    compare: tuple[Path, Path] | None = None
    """Two results files, before and after. Prints what changed, and writes nothing."""
    results: Path = RESULTS
    """The folder that holds DEVICE-DATE.json files."""
    root: Path = ROOT
    """The folder whose README.md, docs/benchmarks.md and docs/plots/ are written."""


def read(path: Path) -> dict[str, Any]:
    """Read a results document. Raises UsageError for a file that cannot be read or is not one."""
    try:
        document = read_json(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; expected a file in benchmarks/results/") from error
    if not isinstance(document, dict) or not {"machine", "subjects"} <= set(document):
        raise UsageError(f"{path} has no machine and subjects; expected what pytest benchmarks --benchmark writes")
    return document


def benchmark_files(results: Path) -> list[Path]:
    """The files of `pytest benchmarks --benchmark`. A day of `make gpu` has stages, and a page of its own."""
    return [file for file in sorted(results.glob("*.json")) if not _of_a_gpu_day(file)]


def _of_a_gpu_day(path: Path) -> bool:
    try:
        document = read_json(path)
    except (OSError, UsageError):
        return False  # `read` refuses it by name
    return isinstance(document, dict) and "stages" in document


def machine_line(document: dict[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version[0].isdigit())
    where = f"{machine['device']} ({machine.get('isa', machine['cpu_capability'])})"
    return f"Measured on {_last_day(document)}, commit {_commits(document)}, on {where}, {versions}."


def _last_day(document: dict[str, Any]) -> str:
    return max(subject["measured"] for subject in document["subjects"])[:10]


def _commits(document: dict[str, Any]) -> str:
    """The commits in the order they were measured; "+" marks one with uncommitted changes."""
    in_order = sorted(document["subjects"], key=lambda subject: subject["measured"])
    return " and ".join(dict.fromkeys(subject["commit"] for subject in in_order))


def section(document: dict[str, Any], stem: str, plots_of: dict[str, Path], docs: Path) -> str:
    """Markdown of one results file: every subject's table, grouped, with each group's plot first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for subject in document["subjects"]:
        groups.setdefault(plots.group(subject["name"]), []).append(subject)
    parts = [f"## {stem}", machine_line(document)]
    for name, subjects in groups.items():
        parts.append(f"### {name}")
        if name in plots_of:
            parts.append(f"![{name}]({plots_of[name].relative_to(docs).as_posix()})")
        for subject in subjects:
            parts.append(f"**{subject['name']}** ({describe(subject['config'])})\n\n{markdown(*cells(subject))}")
    return "\n\n".join(parts)


def newest(documents: dict[str, dict[str, Any]]) -> list[str]:
    """The stems of the files that the summary shows, one for each device, the newest first.

    For each device this is the newest whole file, even if parts (`pytest benchmarks -k rotary --benchmark`) were
    measured after it. If no file of a device is whole, it is the newest part.
    """

    def rank(stem: str) -> tuple[bool, str]:
        return whole(documents[stem]), _last_day(documents[stem])

    found: dict[str, str] = {}
    for stem in sorted((stem for stem in documents if summary.tables(documents[stem])), key=rank, reverse=True):
        found.setdefault(documents[stem]["machine"]["device"], stem)
    return sorted(found.values(), key=lambda stem: _last_day(documents[stem]), reverse=True)


def write(results: Path, root: Path) -> None:
    """Write the page, the plots and the picture. Raises UsageError without results, or without markers in the
    README."""
    files = benchmark_files(results)
    if not files:
        raise UsageError(f"no results in {results}; measure first: make bench, or pytest benchmarks --benchmark")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UsageError(f"{readme} lacks the lines {BEGIN} and {END}, between which the picture goes")
    documents = {file.stem: read(file) for file in files}
    docs = root / "docs"
    sections = [
        section(document, stem, plots.draw(document, docs / "plots" / stem), docs)
        for stem, document in sorted(documents.items(), reverse=True)
    ]
    shown = newest(documents)
    short = [f"**{stem}.** {machine_line(documents[stem])}\n\n{summary.tables(documents[stem])}" for stem in shown]
    parts = (TITLE, HOW, "## In short", *short, *sections)
    (docs / "benchmarks.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    readme.write_text(
        f"{head}{BEGIN}\n{_picture(results, documents, shown, docs)}\n{END}{rest.split(END, 1)[1]}", "utf-8"
    )
    for stem, document in sorted(documents.items()):
        if not whole(document):
            place = "in the summary, since its device has no other" if stem in shown else "not in the summary"
            print(f"{stem} has only a part of the benchmarks: {place} (docs/benchmarks.md). make bench measures all")


def _picture(results: Path, documents: dict[str, dict[str, Any]], shown: list[str], docs: Path) -> str:
    """Draw the README's picture from the first of `shown` that has a training step. Returns Markdown that shows it."""
    drawn = next((stem for stem in shown if overview.has_step(documents[stem])), None)
    if drawn is None:
        return "No training step has been measured yet: `make bench`."
    overview.draw(results, documents[drawn], docs / "plots" / "overview.png")
    return (
        f"![loss of make train, and a training step beside its peers](docs/plots/overview.png)\n\n"
        f"{machine_line(documents[drawn])}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if --compare found something slower; 2 after an error."""
    tolerate_encodings()
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.report", description=__doc__)
    try:
        if options.compare is None:
            write(options.results, options.root)
            return 0
        comparison = regressions.compare(*(read(path) for path in options.compare))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    regressions.show(comparison, console(soft_wrap=True))
    return 1 if comparison.regressed else 0


if __name__ == "__main__":
    sys.exit(main())

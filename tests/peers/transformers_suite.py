"""transformers' own model tests with every model passed through `accelerate`, beside the same tests without.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers   # once; the wheel has no tests
    python tests/peers/transformers_suite.py --tests transformers/tests                # or PHI_FAST_TRANSFORMERS_TESTS

Prints the tests that pass without and not with `accelerate`. Exit status: 0 if there are none, 1 if there are some, 2
if the tests could not be run. The tests must be those of the transformers that is installed; they need pytest and
`parameterized`. Nothing is fetched: the tests that would fetch skip or fail both ways.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from phi_fast.kernels.transformers.families import FAMILIES, Family

VARIABLE = "PHI_FAST_TRANSFORMERS_TESTS"
HERE = Path(__file__).resolve().parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class CannotRun(Exception):
    """Why the tests could not be run, and what to do."""


@dataclass(frozen=True)
class Outcome:
    """How a test ended."""

    passed: bool
    message: str
    """First line of the failure or of the reason for skipping; empty for a test that passed."""


@dataclass(frozen=True)
class Comparison:
    """One family's tests, both ways."""

    plain: dict[str, Outcome]
    accelerated: dict[str, Outcome]

    @property
    def new_failures(self) -> dict[str, str]:
        """Tests that pass without `accelerate` and do not pass with it, and how they end."""
        gone = Outcome(False, "was not run")
        after = {name: self.accelerated.get(name, gone) for name, outcome in self.plain.items() if outcome.passed}
        return {name: outcome.message for name, outcome in after.items() if not outcome.passed}


def file_of(tests: Path, family: Family) -> Path:
    """Raises CannotRun where the tree has no tests of that family."""
    file = tests / "models" / family.name / f"test_modeling_{family.name}.py"
    if not file.is_file():
        raise CannotRun(f"{file} does not exist; --tests wants the folder `tests` of a checkout of transformers")
    return file


def run(file: Path, tests: Path, *, accelerated: bool, options: list[str]) -> dict[str, Outcome]:
    """Outcome by name of the tests in `file`. Raises CannotRun where pytest itself does not get through."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [*(["-p", "accelerated_models"] if accelerated else []), *options]
        environment = {**os.environ, **OFFLINE, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # all passed, some failed
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise CannotRun(f"{' '.join(command)}\nended with status {done.returncode}:\n{tail}")
        return dict(_outcome(case) for case in ElementTree.parse(report).iter("testcase"))


def _outcome(case: ElementTree.Element) -> tuple[str, Outcome]:
    name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            lines = (found.get("message") or kind).splitlines() or [kind]
            return name, Outcome(False, f"{kind}: {lines[0]}")
    return name, Outcome(True, "")


def compare(tests: Path, family: Family, options: list[str]) -> Comparison:
    """Both runs. Where they differ both are repeated once, since some of the tests draw at random: what counts is a
    test that passes twice without and fails twice with `accelerate`."""
    file = file_of(tests, family)
    plain, accelerated = (run(file, tests, accelerated=which, options=options) for which in (False, True))
    found = Comparison(plain, accelerated).new_failures
    if found:
        names = " or ".join(name.rpartition("::")[2] for name in found)
        again = [run(file, tests, accelerated=which, options=["-k", names]) for which in (False, True)]
        steady = [name for name in found if again[0].get(name, Outcome(False, "")).passed]
        for name in found:
            if name not in steady:
                plain[name] = again[0].get(name, Outcome(False, "was not run"))
            elif name in again[1] and again[1][name].passed:
                accelerated[name] = again[1][name]
    return Comparison(plain, accelerated)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tests", default=os.environ.get(VARIABLE), help=f"transformers' tests/; default ${VARIABLE}")
    parser.add_argument("--family", choices=names, action="append", help="repeatable; default all")
    parser.add_argument("-k", dest="expression", help="pytest's -k: the tests to run")
    given = parser.parse_args(arguments)
    options = ["-k", given.expression] if given.expression else []
    try:
        if not given.tests:
            raise CannotRun(f"give transformers' test tree by --tests or {VARIABLE}:\n\n{__doc__}")
        tests, failures = Path(given.tests).resolve(), 0
        for family in FAMILIES:
            if family.name in (given.family or names):
                comparison = compare(tests, family, options)
                failures += _show(family, comparison)
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    print(f"new failures in all: {failures}")
    return 1 if failures else 0


def _show(family: Family, comparison: Comparison) -> int:
    plain, accelerated = (
        sum(outcome.passed for outcome in run.values()) for run in (comparison.plain, comparison.accelerated)
    )
    found = comparison.new_failures
    print(
        f"{family.name}: {len(comparison.plain)} tests, {plain} pass without accelerate, {accelerated} with, "
        f"{len(found)} new failures",
        flush=True,
    )
    for name, message in found.items():
        print(f"  {name}: {message}", flush=True)
    if not plain:
        raise CannotRun(f"{family.name}: no test passed even without accelerate, so nothing was compared")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())

"""Choice and ownership of the run directory: one running trainer per directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..errors import UsageError
from ..files import Claim, writing
from ..json_files import flatten, read_object
from .config_file import plain
from .options import MUST_AGREE, Options

LEFT_BY_A_RUN = ("metrics.jsonl", "config.json", "tensorboard")
"""Files by which a directory is recognised as one that a run began in."""
WAY_OUT = "make room or grant write permission, or name another --run-dir"
"""What to do where the run directory cannot be written."""
RESTART_SECONDS = 15.0
"""How long --elastic waits for the previous start to end: a launcher restarts while the old ranks are still dying."""


class Owned:
    """A run directory that this process owns, through a lock file in it, until it closes it or dies."""

    def __init__(self, directory: Path, claim: Claim, made: bool) -> None:
        self.directory = directory
        self._claim, self._made = claim, made

    @staticmethod
    def choose(options: Options, tell: Callable[[str], None] = print) -> Owned:
        """Choose the directory from the options and lock it, before anything else is written there.

        tell: called with a line that names the process for which --elastic waits.
        Raises UsageError if another process owns it, it holds another run, or there is no run to resume.
        """
        base = options.run_dir or Path("runs") / options.recipe
        if options.elastic and options.run_dir is None:
            raise UsageError("--elastic starts the same command again and again: name its directory with --run-dir")
        if options.resume:
            return Owned._take(newest_run(options), options, tell)
        if options.run_dir is not None:
            return Owned._take(base, options, tell)
        for n in range(1, 10_000):
            directory = base if n == 1 else base.with_name(f"{base.name}-{n}")
            if not directory.exists() and _make(directory):  # if two starts race, only one makes it
                return Owned(directory, _claim(directory, 0, tell), made=True)
        raise UsageError(f"{base} … {base}-9999 are all taken: name a directory with --run-dir")

    @staticmethod
    def _take(directory: Path, options: Options, tell: Callable[[str], None]) -> Owned:
        """Lock a given directory, which must exist if the run is resumed."""
        if options.resume and not directory.exists():
            raise UsageError(
                f"--resume: {directory / 'checkpoints'} has no complete checkpoint; start without --resume, in another "
                "--run-dir"
            )
        made = _make(directory)
        owned = Owned(directory, _claim(directory, RESTART_SECONDS if options.elastic else 0, tell), made)
        try:
            if not options.resume:
                _refuse_another_run(directory, options)
        except BaseException:
            owned.close()
            raise
        return owned

    def keep(self) -> None:
        """Record that a run has begun in the directory, so that `close` does not remove it."""
        self._made = False

    def close(self) -> None:
        """Release the lock, and remove a directory that was made for a run that did not begin."""
        self._claim.release()
        if self._made and not any(self.directory.iterdir()):
            self.directory.rmdir()


def newest_run(options: Options) -> Path:
    """Find the directory to resume: --run-dir, or the newest run of the recipe. Raises UsageError if there is none."""
    if options.run_dir is not None:
        return options.run_dir
    base = Path("runs") / options.recipe
    numbered = [base, *base.parent.glob(f"{base.name}-[0-9]*")]
    found = [path for path in numbered if (path / "checkpoints").exists()]
    if not found:
        raise UsageError(
            f"--resume: there is no run with checkpoints at {base}; name one with --run-dir, or drop --resume"
        )
    return max(found, key=lambda path: (path / "checkpoints").stat().st_mtime)


def _make(directory: Path) -> bool:
    """Make a directory unless it exists; returns whether it was made."""
    with writing(directory, WAY_OUT):
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir()
        except FileExistsError:
            if not directory.is_dir():
                raise
            return False
    return True


def _claim(directory: Path, wait: float, tell: Callable[[str], None]) -> Claim:
    way_out = "wait for it to end, or name another --run-dir"
    with writing(directory, WAY_OUT):
        what = f"the run directory {directory}"
        return Claim.take(directory / ".lock", what, wait=wait, tell=tell, way_out=way_out)


def _refuse_another_run(directory: Path, options: Options) -> None:
    """Raise UsageError if the directory holds files of another run. --elastic may restart its own run."""
    if any((directory / "checkpoints").glob("step-*")):
        if not options.elastic:
            raise UsageError(
                f"--run-dir {directory} already holds checkpoints; add --resume to go on, or name another directory"
            )
        return
    left = [name for name in LEFT_BY_A_RUN if (directory / name).exists()]
    if not left:
        return
    if not options.elastic:
        raise UsageError(
            f"--run-dir {directory} holds {', '.join(left)} of a run that saved no checkpoint: name another directory, "
            "or remove those (--elastic restarts such a run by itself)"
        )
    if (directory / "config.json").exists():
        then, now = (
            flatten({name: fields[name] for name in MUST_AGREE if name in fields})
            for fields in (read_object(directory / "config.json").values, plain(asdict(options)))
        )
        differ = [
            f"{name} is {then[name]}, now {now[name]}"
            for name in now
            if not name.endswith("_token_id") and name in then and then[name] != now[name]
        ]
        if differ:
            raise UsageError(
                f"--run-dir {directory} belongs to another run: {'; '.join(differ)}. Name another directory"
            )
    # All steps are taken again; MetricsLog drops their old lines in metrics.jsonl.
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)

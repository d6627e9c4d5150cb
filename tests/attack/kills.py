"""Kills tiny runs that save every 2 steps with `kill -9`, at random moments and before random file operations."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from test_faults import SAVES, STEPS, killed_and_resumed
from trainer_processes import arguments, finish, make_corpora

from .tally import Tally

KILLS_OF_ONE_RUN = 20


def attack(tally: Tally, seed: int) -> None:
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="phi-fast-attack-") as name:
        folder = Path(name)
        data, undisturbed, run = make_corpora(folder / "data"), folder / "undisturbed", folder / "run"
        finish(arguments(data, undisturbed, STEPS, **SAVES), folder / "output")
        while tally.more():
            most = min(tally.left, KILLS_OF_ONE_RUN)
            try:
                tally.did(killed_and_resumed(data, run, undisturbed, choose, most))
            except (AssertionError, OSError, ValueError) as error:  # the run differs, hangs, or did not leave the file
                tally.raised(f"a run killed up to {most} times", error)
            shutil.rmtree(run, ignore_errors=True)

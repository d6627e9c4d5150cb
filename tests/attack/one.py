"""Runs one campaign in its own process: `python -m attack.one NAME TARGET SECONDS SEED FILE`, with counts in FILE."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .tally import Tally


def main() -> None:
    name, target, seconds, seed, file = sys.argv[1:]
    campaign = importlib.import_module(f"attack.{name}")  # takes some seconds, which do not count towards the budget
    tally = Tally(Path(file), int(target), float(seconds))
    campaign.attack(tally, int(seed))
    tally.write()


if __name__ == "__main__":
    main()

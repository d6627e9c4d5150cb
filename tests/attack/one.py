"""One campaign in a process of its own: `python -m attack.one NAME TARGET SECONDS SEED FILE`, the counts in FILE."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .tally import Tally


def main() -> None:
    name, target, seconds, seed, file = sys.argv[1:]
    campaign = importlib.import_module(f"attack.{name}")  # some seconds, which are not the budget's
    tally = Tally(Path(file), int(target), float(seconds))
    campaign.attack(tally, int(seed))
    tally.write()


if __name__ == "__main__":
    main()

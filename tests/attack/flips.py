"""Every single bit of a checkpoint's manifest flipped: found, or the JSON means what it meant."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from test_checkpoint import flip_is_harmless, save

from .tally import Tally


def attack(tally: Tally, seed: int) -> None:
    """A target of 0 or more bits than there are is all of them; else a random choice."""
    with tempfile.TemporaryDirectory(prefix="phi-fast-attack-") as name:
        save(Path(name), 1, 2)
        whole = (Path(name) / "step-2" / "manifest.json").read_bytes()
        bits = list(range(8 * len(whole)))
        random.Random(seed).shuffle(bits)
        tally.counts.target = min(tally.counts.target or len(bits), len(bits))
        while tally.more():
            bit = bits[tally.counts.done]
            try:
                flip_is_harmless(Path(name), whole, bit)
            except Exception as error:  # whatever it is, a damaged manifest raised it or was taken
                tally.raised(f"bit {bit % 8} of byte {bit // 8}", error)
            tally.did()

"""Flips every bit of a checkpoint's manifest: each flip is detected, or the JSON has the same meaning."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from test_checkpoint import flip_is_harmless, save

from .tally import Tally


def attack(tally: Tally, seed: int) -> None:
    """With a target of 0 or of more bits than there are, flip all of them; otherwise a random choice."""
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
            except Exception as error:  # any error here was raised by a damaged manifest, or one was accepted
                tally.raised(f"bit {bit % 8} of byte {bit // 8}", error)
            tally.did()

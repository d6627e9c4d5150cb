"""The logits of `microsoft/phi-1_5` from transformers' own integration test."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..conversion.load import load

TOKENS = [1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]  # "This is an example statement and this is a test"
LOGITS = [
    [12.2922, 13.3507, 8.6963, 9.1355, 9.3502, 9.2667, 14.2027, 13.1363, 13.5446, 11.1337],
    [12.3323, 14.6050, 8.9986, 8.1580, 9.5654, 6.6728, 12.5966, 12.6662, 12.2784, 11.7522],
]
"""fp32 logits at the first two tokens, for the first ten ids."""
TOLERANCE = 1e-4


@dataclass
class Golden:
    """The difference between a checkpoint's logits and phi-1.5's."""

    checkpoint: str
    largest_error: float
    tolerance: float
    ok: bool


def check(checkpoint: str, device: torch.device) -> Golden:
    """Load a checkpoint (a name on the hub, or a folder in any of phi's layouts) in fp32 and compare its logits.

    Raises ConversionError if it cannot be loaded or is not a phi model.
    """
    model, _ = load(checkpoint, device=str(device), dtype="fp32")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS], device=device)).logits[0, : len(LOGITS), : len(LOGITS[0])]
    error = (logits.cpu() - torch.tensor(LOGITS)).abs().max().item()
    return Golden(checkpoint, error, TOLERANCE, error <= TOLERANCE)

"""Continues text with a model and a key-value cache: `complete` for text, `generate` for token ids."""

from .decode import Decoding, generate
from .sampling import Sampling
from .stream import Completion, TextStream, complete

__all__ = ["Completion", "Decoding", "Sampling", "TextStream", "complete", "generate"]

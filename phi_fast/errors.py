"""Errors whose message is meant for the person at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(ValueError):
    """What was asked for cannot be carried out; the message says what to change."""


@contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Makes a UsageError, which names `path` and what to do, of an OSError inside: a full disk's names no file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): {way_out}") from error

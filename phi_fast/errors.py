"""Errors whose message is meant for the person at the terminal."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for cannot be carried out; the message says what to change."""

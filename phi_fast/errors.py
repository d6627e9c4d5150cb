"""Errors whose message is meant for the user."""

from __future__ import annotations

INTERRUPTED = 75
"""Exit status of a run that was stopped and saved, or lost a rank (EX_TEMPFAIL): start it again with --resume."""


class PhiFastError(Exception):
    """Base class of the errors for users: a command prints the message, without a traceback."""

    status = 2
    """Exit status of a command that this error ends."""
    one_rank = False
    """False: every rank raises the error, and rank 0 reports it. True: the rank that raises it reports it."""


class UsageError(PhiFastError, ValueError):
    """The user's request cannot be carried out; the message says what to change."""


class MachineError(UsageError):
    """A UsageError about the machine of the rank that raises it."""

    one_rank = True

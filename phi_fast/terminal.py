"""What is printed for a person: on any encoding, at any width, and never read as markup or as terminal control."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 and C1 controls but tab and line feed, and the characters that reverse the direction of text."""


def console(*, stderr: bool = False, **options: Any) -> Console:
    """A rich Console on stdout or stderr whose strings, table cells included, are printed as they are.

    options: rich.console.Console's. Style text with `rich.text.Text` or `style=`: square brackets in a name or a path
    that a user typed are no markup. Characters that the stream's encoding lacks are written as escapes.
    """
    _tolerate(sys.stderr if stderr else sys.stdout)
    return Console(stderr=stderr, **{"markup": False, "emoji": False, "highlight": False, **options})


def tolerate_encodings() -> None:
    """Let stdout and stderr write what their encoding lacks as escapes: for the start of a command, before --help."""
    for stream in (sys.stdout, sys.stderr):
        _tolerate(stream)


def announce(command: str, loading: str = "PyTorch") -> None:
    """Say on stderr that a command has begun, before the imports that take seconds: a user who sees nothing for so long
    takes it for hung. Of several ranks the first says it. Does what `tolerate_encodings` does, too."""
    tolerate_encodings()
    if os.environ.get("RANK", "0") == "0":
        print(f"{command}: loading {loading}", file=sys.stderr, flush=True)


def end_on_signals(command: str) -> None:
    """End the process at once and with a word by SIGINT (status 130), SIGTERM and SIGHUP (75): for the imports, during
    which there is nothing to save. What `nohup` ignores stays ignored."""

    def end(number: int, frame: object) -> None:
        print(f"{command}: ended by {signal.Signals(number).name}, before it began", file=sys.stderr, flush=True)
        os._exit(130 if number == signal.SIGINT else 75)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def printable(text: str) -> str:
    """`text` from a model, a file or a user with its control characters as visible escapes, for a terminal: "\\x1b"
    instead of the character that would move the cursor, set a title or answer to a query."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def _tolerate(stream: Any) -> None:
    if hasattr(stream, "reconfigure") and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")

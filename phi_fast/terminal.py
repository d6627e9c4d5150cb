"""What is printed for a person: on any encoding, at any width, and never read as markup or as terminal control."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any

from rich.console import Console

from .startup import tolerate

TABLE_WIDTH, PIPE_WIDTH = 110, 160
"""Columns that the widest table needs at least, and that tables in a file or a pipe have."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 and C1 controls but tab and line feed, and the characters that reverse the direction of text."""


def console(*, stderr: bool = False, **options: Any) -> Console:
    """A rich Console on stdout, stderr or a `file` whose strings, table cells included, are printed as they are.

    options: rich.console.Console's. Style text with `rich.text.Text` or `style=`: square brackets in a name or a path
    that a user typed are no markup. Characters that the stream's encoding lacks are written as escapes.
    """
    tolerate(options.get("file") or (sys.stderr if stderr else sys.stdout))
    return Console(stderr=stderr, **{"markup": False, "emoji": False, "highlight": False, **options})


def table_console(**options: Any) -> Console:
    """A `console` for tables: as wide as the terminal, but no narrower than `TABLE_WIDTH`, so that no name and no
    figure is split: a narrower terminal wraps the lines. `PIPE_WIDTH` where the output is no terminal."""
    width = max(shutil.get_terminal_size().columns, TABLE_WIDTH) if sys.stdout.isatty() else PIPE_WIDTH
    return console(width=width, **options)


def printable(text: str) -> str:
    """`text` from a model, a file or a user with its control characters as visible escapes, for a terminal: "\\x1b"
    instead of the character that would move the cursor, set a title or answer to a query."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)

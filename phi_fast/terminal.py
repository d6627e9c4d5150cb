"""Printing for people: in any encoding, at any width, and without interpreting markup or control characters."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any

from rich.console import Console

from .startup import tolerate

TABLE_WIDTH, PIPE_WIDTH = 110, 160
"""Columns: the least width of the widest table, and the width of tables in a file or a pipe."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 and C1 controls except tab and line feed, and the characters that reverse the direction of text."""


def console(*, stderr: bool = False, **options: Any) -> Console:
    """Make a rich Console on stdout, stderr or a `file` that prints strings, also in table cells, without markup.

    Square brackets in a user's name or path are therefore printed as they are; style text with `rich.text.Text` or
    `style=`. Characters that the stream's encoding lacks are escaped. options: those of rich.console.Console.
    """
    tolerate(options.get("file") or (sys.stderr if stderr else sys.stdout))
    return Console(stderr=stderr, **{"markup": False, "emoji": False, "highlight": False, **options})


def table_console(**options: Any) -> Console:
    """Make a `console` for tables: as wide as the terminal, at least `TABLE_WIDTH`, or `PIPE_WIDTH` without a terminal.

    A terminal narrower than `TABLE_WIDTH` wraps whole lines, so that no cell is split.
    """
    width = max(shutil.get_terminal_size().columns, TABLE_WIDTH) if sys.stdout.isatty() else PIPE_WIDTH
    return console(width=width, **options)


def printable(text: str) -> str:
    """Escape the control characters in text from a model, a file or a user, so that it is safe to print on a terminal.

    For example, "\\x1b" replaces the character that would move the cursor or set a title.
    """
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)

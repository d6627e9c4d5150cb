from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.table import Table

from phi_fast.terminal import console, printable


def test_nothing_is_read_as_markup_or_emoji() -> None:
    output = io.StringIO()
    screen = console(file=output, width=80)
    screen.print("sweep[lr=0.1] x[/data] :smile:")
    table = Table("column [red]")
    table.add_row("[bold]cell[/bold]")
    screen.print(table)
    text = output.getvalue()
    assert "sweep[lr=0.1] x[/data] :smile:" in text and "column [red]" in text and "[bold]cell[/bold]" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str) -> None:
    code = "from phi_fast.terminal import console; console().print('loss × → ━'); print('━')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert b"\\u2192" in done.stdout and b"\\u2501" in done.stdout


def test_terminal_control_is_shown_and_not_obeyed() -> None:
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b]0;title\x07\x9b31m\u202e\r") == r"\x1b]0;title\x07\x9b31m\u202e\r"

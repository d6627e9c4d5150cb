"""The start of a command, before imports that take seconds: this module imports only the standard library."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from typing import Any

TRAIN_EXTRA = (
    "deepspeed",
    "filelock",
    "pydantic",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "tomli_w",
    "tyro",
)
"""Packages that `pip install 'phi-fast[train]'` adds; every command needs them."""


def begin(command: str, loading: str = "", lm_eval: bool = False) -> None:
    """Check that the packages a command needs are installed; exit with status 2 and a message if they are not.

    loading: libraries whose import takes seconds; rank 0 names them on stderr, so that the command does not seem hung.
    lm_eval: the command also needs lm-eval, from the extra `eval`, which includes `train`.
    """
    tolerate_encodings()
    names = [*TRAIN_EXTRA, "lm_eval"] if lm_eval else TRAIN_EXTRA
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        extra = "eval" if lm_eval else "train"
        print(f"error: {command} needs {', '.join(missing)}: pip install 'phi-fast[{extra}]'", file=sys.stderr)
        sys.exit(2)
    if loading and os.environ.get("RANK", "0") == "0":
        print(f"{command}: loading {loading}", file=sys.stderr, flush=True)


def end_on_signals(command: str) -> None:
    """Let SIGINT (status 130), SIGTERM and SIGHUP (75) end the process at once, with a message.

    For the time of the imports, when there is nothing to save. Signals that `nohup` ignores stay ignored.
    """

    def end(number: int, frame: object) -> None:
        print(f"{command}: ended by {signal.Signals(number).name}, before it began", file=sys.stderr, flush=True)
        os._exit(130 if number == signal.SIGINT else 75)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def tolerate_encodings() -> None:
    """Make stdout and stderr escape characters that their encoding lacks; called before --help may be printed."""
    for stream in (sys.stdout, sys.stderr):
        tolerate(stream)


def tolerate(stream: Any) -> None:
    """Make one stream escape characters that its encoding lacks."""
    if hasattr(stream, "reconfigure") and getattr(stream, "errors", None) == "strict":
        stream.reconfigure(errors="backslashreplace")

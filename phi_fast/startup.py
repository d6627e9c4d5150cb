"""What a command does first, before the imports that take seconds: nothing here needs more than Python."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from typing import Any

TRAIN_EXTRA = ("deepspeed", "filelock", "rich", "safetensors", "tensorboard", "tokenizers", "tyro")
"""What `pip install 'phi-fast[train]'` adds to the kernels and the model: every command needs it."""


def begin(command: str, loading: str = "", lm_eval: bool = False) -> None:
    """Check that the command can be imported, and say on stderr what it is loading, if that takes seconds: a user who
    sees nothing for so long takes it for hung. Of several ranks the first says it.

    lm_eval: the command is lm-eval's, which the extra `eval` brings, with all of `train`.

    Ends the process with status 2 where the extra is not installed.
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
    """End the process at once and with a word by SIGINT (status 130), SIGTERM and SIGHUP (75): for the imports, during
    which there is nothing to save. What `nohup` ignores stays ignored."""

    def end(number: int, frame: object) -> None:
        print(f"{command}: ended by {signal.Signals(number).name}, before it began", file=sys.stderr, flush=True)
        os._exit(130 if number == signal.SIGINT else 75)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def tolerate_encodings() -> None:
    """Let stdout and stderr write what their encoding lacks as escapes: for the start of a command, before --help."""
    for stream in (sys.stdout, sys.stderr):
        tolerate(stream)


def tolerate(stream: Any) -> None:
    """Let one stream write what its encoding lacks as escapes."""
    if hasattr(stream, "reconfigure") and getattr(stream, "errors", None) == "strict":
        stream.reconfigure(errors="backslashreplace")

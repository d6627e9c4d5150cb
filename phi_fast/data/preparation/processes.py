"""How worker processes start and end."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext

LONGEST_TEMPORARY = 70
"""Maximum length in bytes of the temporary directory's path: the path of the fork server's socket is some 35 bytes
longer, and a Unix socket's path may have 107."""


def start_method(preload: str) -> BaseContext:
    """How workers start: not forked from this process, which has threads; with a fork server, imports run only once.

    preload: the module that the fork server imports.
    """
    too_long = len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY
    if "forkserver" not in get_all_start_methods() or too_long:
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it; called once in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # otherwise the executor's queues would keep a worker waiting for ever

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phi_fast.errors import UsageError
from phi_fast.files import Claim, sync_directory, write_atomically

OWN_AND_SLEEP = """
import sys, time
from pathlib import Path
from phi_fast.files import Claim
{before}
claim = Claim.take(Path(sys.argv[1]), "the folder")
print("taken", flush=True)
time.sleep(60)
"""
WITHOUT_FLOCK = """
import errno, fcntl
def flock(descriptor, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
"""


def owner(lock: Path, before: str = "") -> subprocess.Popen[str]:
    """Start a process that holds `lock` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_AND_SLEEP.format(before=before), str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fail)
    sync_directory(tmp_path)


def test_a_directory_whose_sync_fails_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync_directory(tmp_path)


@pytest.mark.parametrize("before", ["", WITHOUT_FLOCK], ids=["flock", "no flock"])
def test_what_another_process_owns_is_refused_by_its_name_and_free_after_its_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    lock = tmp_path / "lock"
    process = owner(lock, before)
    try:
        if before:
            monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
        with pytest.raises(UsageError, match=rf"the folder is in use by process {process.pid} on .*remove {lock}"):
            Claim.take(lock, "the folder")
        said: list[str] = []
        with pytest.raises(UsageError, match="in use"):
            Claim.take(lock, "the folder", wait=0.2, tell=said.append)
        assert len(said) == 1 and f"process {process.pid}" in said[0] and "0 s" in said[0]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Claim.take(lock, "the folder", wait=5):
        pass


def test_a_claim_released_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        Claim.take(tmp_path / "lock", "the folder").release()

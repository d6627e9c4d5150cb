"""Control groups: the kernel counts and limits the total memory and number of processes of one hostile program.

See cgroups(7). In version 1 the program's group is made below the group of this process. In version 2 a group that has
processes cannot have children with a memory limit, unless it is the root. There the program's group is made below the
nearest ancestor that passes the memory controller on, provided that no group in between sets a limit, since the program
would escape it. Only the program is moved to another group. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "phi-fast-sandbox-"
REMOVAL_SECONDS = 5.0
MEMORY_LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
EVENTS = {1: "memory.oom_control", 2: "memory.events"}
"""Files with a line "oom_kill N": the number of processes that the kernel killed for the group's memory limit."""


class Group:
    """One program's control group: a directory in each hierarchy. `remove` kills every process in it.

    Each directory is locked until then. If this process dies, the kernel releases the lock, and the next process that
    makes a group removes the directory.
    """

    def __init__(self, settings: dict[Path, dict[str, str]]) -> None:
        """settings: for each parent directory, the files of the new group and their contents. The first file is
        required; others are skipped if the kernel does not have them. Raises OSError."""
        self.folders: list[Path] = []
        self._locks: list[int] = []
        try:
            for parent, values in settings.items():
                folder = self._make(parent)
                for number, (name, value) in enumerate(values.items()):
                    if number == 0 or (folder / name).exists():
                        (folder / name).write_text(value)
        except OSError:
            self.remove()
            raise

    def _make(self, parent: Path) -> Path:
        while True:
            folder = parent / f"{PREFIX}{secrets.token_hex(8)}"
            folder.mkdir()
            lock = claim(folder)
            if lock is not None:
                self.folders.append(folder)
                self._locks.append(lock)
                return folder

    def remove(self) -> None:
        """Kill the group's processes and remove its directories. A directory that cannot be removed in time is left to
        `remove_leftovers`."""
        for folder in self.folders:
            remove(folder)
        for lock in self._locks:
            os.close(lock)
        self.folders, self._locks = [], []


def claim(folder: Path) -> int | None:
    """Lock a group's directory and return the descriptor; None if another process has locked or removed it."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def remove(folder: Path) -> None:
    """Kill a group's processes and remove its directory. Version 1 cannot kill a group; there this waits until the
    program's processes have ended, which the kernel kills with their supervisor."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if (folder / "cgroup.kill").exists():
                (folder / "cgroup.kill").write_text("1")
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.01)


def remove_leftovers(parent: Path) -> None:
    """Remove the groups that earlier processes left behind when they died."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = claim(folder)
        if lock is not None:
            remove(folder)
            os.close(lock)


def settings(memory_mb: int, processes: int) -> dict[Path, dict[str, str]] | None:
    """The argument of `Group` for these limits; None if no control group for memory is available."""
    found = places()
    if found is None:
        return None
    version, memory, pids = found
    size = str(memory_mb << 20)
    if version == 2:
        limits = {"memory.max": size, "memory.swap.max": "0", "memory.oom.group": "1", "pids.max": str(processes)}
        return {memory: limits}
    chosen = {memory: {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes": size}}
    return chosen | ({pids: {"pids.max": str(processes)}} if pids else {})


@functools.cache
def places() -> tuple[int, Path, Path | None] | None:
    """The version, and the directories in which groups for memory and for processes can be made (tested with a waiting
    process); None if there is no such directory, or this user may not use it."""
    own = own_directories(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    if "memory" in own:
        version, candidates = 1, iter([own["memory"][0]])
    elif "" in own:
        version, candidates = 2, places_2(*own[""])
    else:
        return None
    memory = next((each for each in candidates if tried(each, MEMORY_LIMITS[version], str(1 << 30))), None)
    if memory is None:
        return None
    remove_leftovers(memory)
    pids = own["pids"][0] if version == 1 and "pids" in own else None
    if pids is None or not tried(pids, "pids.max", "16"):
        return version, memory, None
    remove_leftovers(pids)
    return version, memory, pids


def own_directories(cgroup: str, mountinfo: str) -> dict[str, tuple[Path, Path]]:
    """For each controller of version 1, and "" for version 2: this process's directory, and the hierarchy's top.

    cgroup, mountinfo: the contents of these files in /proc/self.
    """
    paths: dict[str, str] = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    found = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, top = (field.encode().decode("unicode_escape") for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        names = {"cgroup2": [""], "cgroup": options.split(",")}.get(kind, [])
        for name in paths.keys() & set(names):
            own = Path(paths[name])
            if own.is_relative_to(root) and ".." not in own.parts:
                found[name] = (Path(top) / own.relative_to(root), Path(top))
    return found


def places_2(own: Path, top: Path) -> Iterator[Path]:
    """Directories of version 2 that pass the memory controller on to their children: this process's own, then its
    ancestors, up to the first group that sets a limit."""
    if not (own / "cgroup.type").exists():  # the root: it alone has no type, and may have both processes and children
        with contextlib.suppress(OSError):
            (own / "cgroup.subtree_control").write_text("+memory +pids")
    for folder in (own, *own.parents):
        with contextlib.suppress(OSError):
            if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                yield folder
        limits = [folder / name for name in ("memory.max", "memory.high", "memory.swap.max", "pids.max")]
        if folder == top or any(limit.exists() and limit.read_text().strip() != "max" for limit in limits):
            return


def tried(parent: Path, name: str, value: str) -> bool:
    """Test whether a group can be made in `parent`, limited by writing `value` to its file `name`, and entered."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    group = None
    try:
        group = Group({parent: {name: value}})
        (group.folders[0] / "cgroup.procs").write_text(str(process.pid))
    except OSError:
        return False
    finally:
        process.kill()
        process.communicate()
        if group:
            group.remove()
    return True

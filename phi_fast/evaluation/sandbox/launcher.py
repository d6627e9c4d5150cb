"""The supervisor of one hostile program: builds the sandbox, starts the program, watches it, reports, kills.

`run_program` runs it as a script (standard library only). It reads its specification as JSON from standard input. To
standard output it writes a line once the program runs, then its report as JSON. The supervisor is process 1 of the
program's process table: the program cannot signal it, and the kernel kills all other processes when it exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import secrets
import select
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -I does not add the script's folder
import cgroup
import namespaces
import seccomp

POLL_SECONDS = 0.02
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
STANDING = "the sandbox stands"
"""Written once the program runs: any later failure was caused by the program."""


def main() -> None:
    spec = json.load(sys.stdin)
    die_with_parent()
    try:
        group = ControlGroup(spec["groups"])
        namespaces.unshare()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        die_with_parent()
        proc = namespaces.enter_root(spec["folder"], spec["prefix"], spec["limits"]["disk_mb"])
        os.chdir("/tmp")
        # Without root the program runs as this process's user: it must not read its memory or copy its descriptors.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        report = Supervisor(spec, proc, group).run()
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class ControlGroup:
    """The program's control groups, as descriptors opened before the root is swapped: the sandbox cannot see them."""

    def __init__(self, folders: list[str]) -> None:
        self.entries = [os.open(f"{folder}/cgroup.procs", os.O_WRONLY) for folder in folders]
        files = [f"{folder}/{name}" for folder in folders for name in cgroup.EVENTS.values()]
        self.events = [os.open(file, os.O_RDONLY) for file in files if Path(file).exists()]

    def enter(self) -> None:
        """Move the calling process into the groups, and with it all processes that it will start."""
        for entry in self.entries:
            os.write(entry, b"0")

    def full(self) -> bool:
        """Whether the kernel has killed a process because of the group's memory limit."""
        lines = [line for file in self.events for line in os.pread(file, 4096, 0).splitlines()]
        return any(line.startswith(b"oom_kill ") and line != b"oom_kill 0" for line in lines)


class Supervisor:
    """Supervises one program: `run` starts it and returns the report."""

    def __init__(self, spec: dict, proc: int, group: ControlGroup) -> None:
        self.spec, self.limits, self.proc, self.group = spec, spec["limits"], proc, group
        self.output = bytearray()
        self.token = secrets.token_hex(16).encode()
        Path("program.json").write_text(json.dumps(spec["program"]), encoding="utf-8")

    def run(self) -> dict:
        start = time.monotonic()
        output, proof = self.start()
        print(STANDING, flush=True)
        reason = self.watch(start, output)
        if reason == "passed" and os.read(proof, 64) != self.token:
            reason = "exited before its last line"
        self.kill()
        text = self.output.decode("utf-8", "replace")
        return {"passed": reason == "passed", "reason": reason, "output": text, "seconds": time.monotonic() - start}

    def start(self) -> tuple[int, int]:
        """Fork the program. Returns the read ends of its output and of its proof."""
        token_in, token_write = os.pipe()
        proof, token_out = os.pipe()
        output, output_write = os.pipe()
        failure, failure_write = os.pipe()  # closed by a successful exec
        os.write(token_write, self.token)
        self.program = os.fork()
        if self.program == 0:
            try:
                self.group.enter()
                ends = [os.dup(os.open("/dev/null", os.O_RDONLY)), output_write, output_write, token_in, token_out]
                ends = [os.dup2(end, 100 + i) for i, end in enumerate(ends)]
                failure_write = os.dup2(failure_write, 110, inheritable=False)
                for i, end in enumerate(ends):
                    os.dup2(end, i)
                os.closerange(5, 110)
                self.confine()
                os.execve(self.spec["python"], ["python", "-I", "-X", "utf8", "-c", INSIDE], {})
            except BaseException as error:
                os.write(failure_write, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(127)
        for end in (token_in, token_write, token_out, output_write, failure_write):
            os.close(end)
        if message := os.read(failure, 4096):
            raise RuntimeError(
                f"the program could not be started: {message.decode()} (root runs it as a user that owns nothing, "
                "which must be able to read the interpreter)"
            )
        return output, proof

    def confine(self) -> None:
        """Confine the child: its own session, limits, an unprivileged user, the system-call filter."""
        os.setsid()
        limits = self.limits
        mebibyte = 1 << 20
        for kind, value in (
            (resource.RLIMIT_CPU, limits["cpu_seconds"]),
            (resource.RLIMIT_AS, limits["memory_mb"] * mebibyte),
            (resource.RLIMIT_FSIZE, limits["disk_mb"] * mebibyte),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, limits["processes"]),
        ):
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        if os.getuid() == 0:
            namespaces.become_nobody()
        seccomp.install()

    def watch(self, start: float, output: int) -> str:
        """Wait until the program ends or exceeds a limit. Returns "passed" for exit code 0, else what happened."""
        kept = self.limits["output_kb"] * 1024
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while True:
            if poll.poll(POLL_SECONDS * 1000) and not self.read(output, kept):
                poll.unregister(output)  # every process has closed it: poll would return at once from now on
                time.sleep(POLL_SECONDS / 10)
            if len(self.output) > kept:
                del self.output[kept:]
                return f"more than {self.limits['output_kb']} KiB of output"
            status = self.reap()
            if reason := self.memory():
                return reason
            if status is not None:
                while poll.poll(0) and len(self.output) <= kept and self.read(output, kept):
                    pass
                return self.verdict(status)
            if time.monotonic() - start > self.limits["wall_seconds"]:
                return "timeout"

    def memory(self) -> str:
        """How the processes exceed the memory limit; "" while they stay within it."""
        limit = self.limits["memory_mb"]
        if self.group.events:
            return f"more than {limit} MiB of memory in all its processes" if self.group.full() else ""
        resident = sum(rss for _, rss in self.members()) >> 20
        return f"{resident} MiB of memory in all its processes" if resident > limit else ""

    def read(self, output: int, kept: int) -> bool:
        chunk = os.read(output, 65536)
        self.output += chunk[: kept + 1 - len(self.output)]
        return bool(chunk)

    def reap(self) -> int | None:
        """Collect ended processes, orphans included. Returns the program's own wait status once it has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid == self.program:
                return status

    def verdict(self, status: int) -> str:
        if os.WIFSIGNALED(status):
            return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
        if code := os.WEXITSTATUS(status):
            return f"exit code {code}"
        if left := len(self.members()):
            return f"left {left} process{'es' * (left > 1)} behind"
        return "passed"

    def members(self) -> list[tuple[int, int]]:
        """(pid, resident bytes) of the sandbox's live processes, except this one."""
        pids = [int(name) for name in self.list_proc(".") if name.isdigit() and name != "1"]
        resident = {pid: self.resident(pid) for pid in pids}
        return [(pid, size) for pid, size in resident.items() if size is not None]

    def resident(self, pid: int) -> int | None:
        """Resident bytes of a process, None if none of its threads is alive. A process whose first thread has ended
        looks like a zombie without memory, but its other threads still hold the memory; only their entries show it."""
        for thread in self.list_proc(f"{pid}/task"):
            try:
                fields = self.read_proc(f"{pid}/task/{thread}/stat").rpartition(")")[2].split()  # state, parent, ...
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since the listing
            if fields[0] not in "ZX":
                return int(fields[21]) * resource.getpagesize()
        return None

    def list_proc(self, path: str) -> list[str]:
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        except (FileNotFoundError, ProcessLookupError):
            return []
        try:
            return os.listdir(folder)  # noqa: PTH208 - a descriptor, not a path
        except ProcessLookupError:
            return []
        finally:
            os.close(folder)

    def read_proc(self, path: str) -> str:
        with os.fdopen(os.open(path, os.O_RDONLY, dir_fd=self.proc)) as file:
            return file.read()

    def kill(self) -> None:
        """Kill the remaining processes and wait for them, before the kernel kills them at the supervisor's exit."""
        for _ in range(100):
            pids = [pid for pid, _ in self.members()]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if not pids:
                return
            time.sleep(0.01)


if __name__ == "__main__":
    main()

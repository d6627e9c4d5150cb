"""The supervisor of one hostile program: builds the sandbox, starts the program, watches it, reports, kills.

Run as a script by `run_program` (standard library only; its specification is JSON on standard input, its report JSON
on standard output). Under "namespaces" the supervisor is process 1 of the program's process table: the program cannot
signal it, and the kernel kills whatever is left when it exits.
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

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves the script's folder out
import namespaces
import seccomp

POLL_SECONDS = 0.02
NONCE_IN, NONCE_OUT = 3, 4
PR_SET_PDEATHSIG = 1

# Runs inside the sandbox. The nonce proves that the last line was reached; the program's globals do not hold it.
BOOTSTRAP = f"""
import os
def run(path):
    nonce = os.read({NONCE_IN}, 64)
    os.close({NONCE_IN})
    with open(path, encoding="utf-8") as file:
        source = file.read()
    exec(compile(source, path, "exec"), {{"__name__": "__main__"}})
    os.write({NONCE_OUT}, nonce)
run("program.py")
"""


def main() -> None:
    spec = json.load(sys.stdin)
    die_with_parent()
    try:
        if spec["isolation"] == "namespaces":
            namespaces.unshare()
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                return
            die_with_parent()
            proc = namespaces.enter_root(spec["folder"], spec["prefix"], spec["limits"]["disk_mb"])
            os.chdir("/tmp")
        else:
            os.chdir(spec["folder"])
            Path(spec["folder"]).chmod(0o777)
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if Path("/proc/self").is_dir() else None
        report = Supervisor(spec, proc).run()
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Supervisor:
    """One program: `run` starts it and returns the report."""

    def __init__(self, spec: dict, proc: int | None) -> None:
        self.spec, self.limits, self.proc = spec, spec["limits"], proc
        self.own_namespace = spec["isolation"] == "namespaces"
        self.output = bytearray()
        self.nonce = secrets.token_hex(16).encode()

    def run(self) -> dict:
        Path("program.py").write_text(self.spec["source"], encoding="utf-8")
        start = time.monotonic()
        output, proof = self.start()
        reason = self.watch(start, output)
        if reason == "passed" and os.read(proof, 64) != self.nonce:
            reason = "exited before its last line"
        self.kill()
        text = self.output.decode("utf-8", "replace")
        return {"passed": reason == "passed", "reason": reason, "output": text, "seconds": time.monotonic() - start}

    def start(self) -> tuple[int, int]:
        """Fork the program. Returns the reading ends of its output and of its proof."""
        nonce_in, nonce_write = os.pipe()
        proof, nonce_out = os.pipe()
        output, output_write = os.pipe()
        failure, failure_write = os.pipe()  # closed by a successful exec
        os.write(nonce_write, self.nonce)
        self.processes = self.limits["processes"]
        if not self.own_namespace and os.getuid():
            self.processes += self.user_processes()  # the kernel counts all of the user's
        self.program = os.fork()
        if self.program == 0:
            try:
                ends = [os.dup(os.open("/dev/null", os.O_RDONLY)), output_write, output_write, nonce_in, nonce_out]
                ends = [os.dup2(end, 100 + i) for i, end in enumerate(ends)]
                failure_write = os.dup2(failure_write, 110, inheritable=False)
                for i, end in enumerate(ends):
                    os.dup2(end, i)
                os.closerange(5, 110)
                self.confine()
                os.execve(self.spec["python"], ["python", "-I", "-X", "utf8", "-c", BOOTSTRAP], {})
            except BaseException as error:
                os.write(failure_write, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(127)
        for end in (nonce_in, nonce_write, nonce_out, output_write, failure_write):
            os.close(end)
        if message := os.read(failure, 4096):
            raise RuntimeError(
                f"the program could not be started: {message.decode()} (as root it runs as a user that owns nothing, "
                "to whom the interpreter must be readable)"
            )
        return output, proof

    def confine(self) -> None:
        """In the child: its own group, limits, an unprivileged user, the call filter."""
        os.setsid()
        limits = self.limits
        mebibyte = 1 << 20
        for kind, value in (
            (resource.RLIMIT_CPU, limits["cpu_seconds"]),
            (resource.RLIMIT_AS, limits["memory_mb"] * mebibyte),
            (resource.RLIMIT_FSIZE, limits["disk_mb"] * mebibyte),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, self.processes),
        ):
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        if os.getuid() == 0:
            namespaces.become_nobody()
        if seccomp.supported():
            seccomp.install()

    def watch(self, start: float, output: int) -> str:
        """Wait for the end, or a broken limit. Returns "passed" for exit code 0, else what happened."""
        kept = self.limits["output_kb"] * 1024
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while True:
            if poll.poll(POLL_SECONDS * 1000) and not self.read(output, kept):
                poll.unregister(output)  # closed by every process: poll would return at once from here on
                time.sleep(POLL_SECONDS / 10)
            if len(self.output) > kept:
                del self.output[kept:]
                return f"more than {self.limits['output_kb']} KiB of output"
            status = self.reap()
            if status is not None:
                while poll.poll(0) and len(self.output) <= kept and self.read(output, kept):
                    pass
                return self.verdict(status)
            if time.monotonic() - start > self.limits["wall_seconds"]:
                return "timeout"
            resident = sum(rss for _, rss in self.members()) >> 20
            if resident > self.limits["memory_mb"]:
                return f"{resident} MiB of memory in all its processes"

    def read(self, output: int, kept: int) -> bool:
        chunk = os.read(output, 65536)
        self.output += chunk[: kept + 1 - len(self.output)]
        return bool(chunk)

    def reap(self) -> int | None:
        """Collect ended processes (orphans come to process 1); the program's own wait status, once it has ended."""
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
        """(pid, resident bytes) of the sandbox's live processes, without this one. Empty where there is no /proc."""
        found: list[tuple[int, int]] = []
        if self.proc is None:
            return found
        for name in os.listdir(self.proc):  # noqa: PTH208 - a descriptor, not a path
            if not name.isdigit() or (self.own_namespace and name == "1"):
                continue
            try:
                state = self.read_proc(f"{name}/stat").rpartition(")")[2].split()  # state, ppid, pgrp, session, ...
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since the listing
            ours = self.own_namespace or state[3] == str(self.program)
            if ours and state[0] not in "ZX":
                found.append((int(name), int(state[21]) * resource.getpagesize()))
        return found

    def user_processes(self) -> int:
        """Threads of this user on the whole machine, which RLIMIT_NPROC counts where there is no user namespace."""
        if self.proc is None:
            return 512
        count = 0
        for name in os.listdir(self.proc):  # noqa: PTH208 - a descriptor, not a path
            try:
                if name.isdigit() and os.stat(name, dir_fd=self.proc).st_uid == os.getuid():
                    count += int(self.read_proc(f"{name}/stat").rpartition(")")[2].split()[17])
            except (FileNotFoundError, ProcessLookupError):
                continue
        return count

    def read_proc(self, path: str) -> str:
        with os.fdopen(os.open(path, os.O_RDONLY, dir_fd=self.proc)) as file:
            return file.read()

    def kill(self) -> None:
        """End whatever is left. Under "namespaces" leaving this process does so too, without a race."""
        for _ in range(100):
            if self.own_namespace:
                pids = [pid for pid, _ in self.members()]
            else:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.program, signal.SIGKILL)
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

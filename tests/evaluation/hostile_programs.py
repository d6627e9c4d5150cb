"""Programs that must not run outside of a sandbox. In it, none may pass or touch anything outside."""

from __future__ import annotations

NAMED = (
    ("assert 1 == 2", "exit code 1"),
    ("def broken(:", "exit code 1"),
    ("import sys; sys.exit(0)", "exited before its last line"),
    ("import os; os._exit(0)", "exited before its last line"),
    ("while True: pass", "timeout"),
    ("import time; time.sleep(60)", "timeout"),
    ("import ctypes; ctypes.string_at(0)", "signal SIGSEGV"),
    ("while True: print('x' * 10000)", "more than 64 KiB of output"),
    ("import os\nif os.fork() == 0:\n    while True: pass", "left 1 process behind"),
    ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "timeout"),
)
"""Programs, and the reasons that their results must give."""

AGAINST_THE_SUPERVISOR = (
    "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
    "import ctypes\nassert ctypes.CDLL(None).syscall(434, 1, 0) >= 0, 'denied'",  # pidfd_open
    "import ctypes\nassert ctypes.CDLL(None).syscall(101, 16, 1, 0, 0) >= 0, 'denied'",  # ptrace
    "open('/proc/1/mem', 'wb')",
    "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, 1)\nfcntl.fcntl(r, 10, 9)\n"
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')\nwhile True: pass",
)

_KILLS = tuple(
    f"import os\nos.kill({who}, {number})\nassert 0" for who in (1, -1, "os.getppid()") for number in (9, 15, 19)
)
_FILES = (
    "print(open('/etc/passwd').read())",
    "print(open('/etc/shadow').read())",
    "print(open('/proc/1/environ').read())",
    "print(open('/proc/1/maps').read()); assert 0",
    "import os; print(os.listdir('/home'))",
    "print(open('/root/.bashrc').read())",
    "import os; open(os.__file__, 'a')",
    "open('/usr/planted', 'w')",
    "import os; os.mkdir('/planted')",
    "import os; os.chroot('/tmp'); os.chdir('../../..')",
    "import os; os.setuid(0); assert os.getuid() == 0 and open('/root/x', 'w')",
    "import os; os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0)); open('/tmp/disk', 'rb').read(512)",
    # Only opened, not written: a write would harm a machine whose sandbox has a hole.
    "open('/proc/sys/kernel/core_pattern', 'r+')",
    "open('/proc/sysrq-trigger', 'w')",
    "open('/sys/power/state', 'r+')",
    "open('/dev/mem', 'rb').read(1)",
    "import os; os.symlink('/etc/passwd', 'link'); print(open('link').read())",
)
_NETWORK = (
    "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
)
_CALLS = tuple(
    f"import ctypes\nassert ctypes.CDLL(None).syscall({call}) >= 0, 'denied'"
    for call in (
        *("272, 0x10000000", "165, b'none', b'/tmp', b'tmpfs', 0, 0", "56, 0x10000011, 0, 0, 0, 0"),
        *("319, b'x', 0", "29, 0, 1 << 30, 0o1600", "240, b'x', 0o102, 0o600, 0", "321, 0, 0, 0", "298, 0, 0, 0, 0, 0"),
    )
)
_FLOODS = (
    "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError: pass",
    "blocks = [bytearray(1 << 24) for _ in range(1 << 10)]",
    "with open('flood', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "for i in range(10**6):\n    open(f'flood{i}', 'wb').write(bytes(1 << 16))",
    "import os\nheld = []\nwhile True: held.append(os.pipe())",
    "import os\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        os.fork()\n"
    "        while True: pass\nassert 0",
)

_SHARED = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
for _ in range(8):
    block = libc.mmap(None, 60 << 20, 3, {flags}, {file}, 0)
    assert block and block != 2 ** 64 - 1, "denied"
    ctypes.memset(block, 1, 60 << 20)
    libc.munmap(ctypes.c_void_p(block + 4096), (60 << 20) - 4096)
"""
UNCOUNTED = {
    "shared memory of which one page is mapped still": _SHARED.format(flags="0x21", file="-1"),
    "shared memory of /dev/zero": _SHARED.format(flags="1", file="os.open('/dev/zero', os.O_RDWR)"),
    "pages that a pipe holds, each of a huge one": """
import ctypes, fcntl, os
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
pipe, huge = os.pipe()[1], 2 << 20
fcntl.fcntl(pipe, 1031, 1 << 20)  # F_SETPIPE_SZ
for _ in range(200):
    block = libc.mmap(None, 2 * huge, 3, 0x22, -1, 0)
    start = (block + huge - 1) // huge * huge
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(huge), 14)
    ctypes.memset(start, 1, huge)
    vector = (ctypes.c_size_t * 2)(start, 4096)
    assert libc.vmsplice(pipe, vector, ctypes.c_size_t(1), 0) == 4096, "denied"
    libc.munmap(ctypes.c_void_p(block), ctypes.c_size_t(2 * huge))
""",
    "what connections hold that nobody has accepted": """
import socket
server = socket.socket(socket.AF_UNIX)
server.bind("\\0x")
server.listen(4096)
for _ in range(1500):
    client = socket.socket(socket.AF_UNIX)
    client.connect("\\0x")
    client.setblocking(False)
    try:
        while True: client.send(bytes(65536))
    except BlockingIOError: pass
    client.close()
""",
    "what sockets hold whose senders are closed": """
import socket
held = []
for i in range(50):
    held.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    held[-1].bind(f"\\0{i}")
    for _ in range(11):
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.sendto(bytes(200000), socket.MSG_DONTWAIT, f"\\0{i}")
""",
    "larger buffers of sockets": """
import socket
for _ in range(30):
    sender = socket.socketpair()[0]
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
""",
    "events of files that nobody reads": """
import ctypes, os
libc = ctypes.CDLL(None)
for _ in range(50):
    queue = libc.inotify_init1(0)
    assert queue >= 0, "denied"
    libc.inotify_add_watch(queue, b"/tmp", 0xfff)
for i in range(20000):
    name = "x" * 240 + str(i % 2)
    open(name, "w").close()
    os.remove(name)
""",
}
"""Ways to hold kernel memory that shows in no process. Each holds some 500 MiB, and passes if nothing stops it."""

HOSTILE = (
    *(source for source, _ in NAMED),
    *AGAINST_THE_SUPERVISOR,
    *_KILLS,
    *_FILES,
    *_NETWORK,
    *_CALLS,
    *_FLOODS,
    *UNCOUNTED.values(),
)
"""All hostile programs. {port}: the port of a server on this machine's loopback."""

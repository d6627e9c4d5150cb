"""A system-call filter (classic BPF, seccomp(2)) for a hostile program: denies the calls that help it to escape."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data, little endian.
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENT_0_OFFSET, ARGUMENT_3_OFFSET = 0, 4, 16, 40
CLONE_NEWUSER = 0x10000000
AF_UNIX = 1
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20
X32_BIT = 0x40000000

# name: (x86-64, AArch64); None where the architecture has no such call.
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
DENIED = {
    "mount": (165, 40),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    # memory that belongs to no process, so that no limit counts it
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "socket": (41, 198),  # socketpair stays: data in a socket with an address outlives the sender
    "setsockopt": (54, 208),  # it could make buffers larger
    # a candidate and its tests run as the same user: neither may access the other or the supervisor
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    # descriptors sent over sockets keep sockets and their buffers alive beyond the limit on open files
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
CLONE, CLONE3, SOCKETPAIR, PRLIMIT, MMAP = (56, 220), (435, 435), (53, 199), (302, 261), (9, 222)


def filter_program() -> bytes:
    """The BPF instructions. Denied calls fail with EPERM; clone3 with ENOSYS, so that libc falls back to clone."""
    column, architecture = ARCHITECTURES[platform.machine()]
    program = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, RET_KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_OFFSET),
        (JUMP_GREATER_EQUAL, 0, 1, X32_BIT),
        (RETURN, 0, 0, RET_KILL_PROCESS),
    ]
    for number in (numbers[column] for numbers in DENIED.values()):
        if number is not None:
            program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, RET_ERRNO | errno.EPERM)]
    program += [
        (JUMP_EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, RET_ERRNO | errno.ENOSYS),
        # clone: not into a new user namespace, where the process would have every capability
        (JUMP_EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, ARGUMENT_0_OFFSET),
        (JUMP_SET, 0, 1, CLONE_NEWUSER),
        (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
        (RETURN, 0, 0, RET_ALLOW),
        # prlimit: only the caller's own limits
        (JUMP_EQUAL, 0, 4, PRLIMIT[column]),
        (LOAD, 0, 0, ARGUMENT_0_OFFSET),
        (JUMP_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
        (RETURN, 0, 0, RET_ALLOW),
        # mmap: no shared memory without a file
        (JUMP_EQUAL, 0, 5, MMAP[column]),
        (LOAD, 0, 0, ARGUMENT_3_OFFSET),
        (JUMP_SET, 0, 2, MAP_SHARED),
        (JUMP_SET, 0, 1, MAP_ANONYMOUS),
        (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
        (RETURN, 0, 0, RET_ALLOW),
        # socketpair: only between processes of this sandbox
        (JUMP_EQUAL, 0, 3, SOCKETPAIR[column]),
        (LOAD, 0, 0, ARGUMENT_0_OFFSET),
        (JUMP_EQUAL, 1, 0, AF_UNIX),
        (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def install() -> None:
    """Install the filter for this process and all that it starts, irrevocably. Raises OSError if the kernel refuses."""
    code = filter_program()
    libc = ctypes.CDLL(None, use_errno=True)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    program = Program(len(code) // 8, code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp was refused")

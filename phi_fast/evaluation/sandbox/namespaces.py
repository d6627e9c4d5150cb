"""Linux namespaces for the sandbox, by direct system calls: users, processes, mounts, network, IPC, host name.

Standard library only: launcher.py imports it and runs without this package. See namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store")
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random")  # no /dev/zero: no limit counts the memory of its shared maps
FIRST_UID, UIDS = 61184, 4336  # systemd's range for dynamic users; fits 16-bit uid maps


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare() -> None:
    """Enter new namespaces; the next child is process 1. Without root this needs a user namespace as well."""
    if platform.machine() not in PIVOT_ROOT:
        raise OSError(f"the sandbox supports {' and '.join(PIVOT_ROOT)} only, not {platform.machine()}")
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        check(libc().unshare(flags), "unshare")
        return
    check(libc().unshare(flags | CLONE_NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def become_nobody() -> None:
    """Switch from root to a random user id that owns nothing. The following exec drops the capabilities."""
    uid = FIRST_UID + int.from_bytes(os.urandom(4), "little") % UIDS
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def enter_root(folder: str, prefix: str, disk_mb: int) -> int:
    """Replace the root by a read-only one with Python, /tmp (`disk_mb` MiB) and three devices.

    Returns a descriptor of the new process table's /proc, which is unmounted again: the program does not see it.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source in dict.fromkeys([*SYSTEM_FOLDERS, prefix]):
        show_read_only(source, folder)
    for device in DEVICES:
        target = inside(folder, device)
        target.parent.mkdir(exist_ok=True)
        target.touch()
        mount(device, str(target), None, MS_BIND)
    for name in ("tmp", "proc"):
        inside(folder, "/" + name).mkdir()
    mount("tmpfs", f"{folder}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_mb}m,nr_inodes=4096,mode=1777")
    mount("proc", f"{folder}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(folder)
    check(libc().syscall(PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    check(libc().umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    check(libc().umount2(b"/proc", MNT_DETACH), "umount /proc")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    return proc


def show_read_only(source: str, folder: str) -> None:
    """Mount a folder of the machine read-only at the same path under `folder`; a link stays a link."""
    target = inside(folder, source)
    if not os.path.lexists(source) or os.path.lexists(target):
        return
    if Path(source).is_symlink():
        target.symlink_to(Path(source).readlink())
        return
    target.mkdir(parents=True)
    mount(source, str(target), None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    result = libc().syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes, size)
    check(result, f"read-only {source}")


def inside(folder: str, path: str) -> Path:
    return Path(folder) / path.lstrip("/")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = libc().mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3])
    check(result, f"mount {target}")

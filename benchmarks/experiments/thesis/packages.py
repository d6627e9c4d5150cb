"""The Debian packages that the corpora are read from: pinned versions, checksums, download, and the files inside."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from phi_fast.errors import UsageError
from phi_fast.files import sha256_of

LIST = Path(__file__).with_name("packages.tsv")
CHOSEN = Path(__file__).with_name("books.toml")
ROLES = ("book", "exemplar", "held_out", "raw")
MAX_FILE = 4_000_000
"""Bytes of the largest file that is read as a document."""


@dataclass(frozen=True)
class Package:
    """One pinned binary package of Debian 12 (bookworm), main."""

    role: str
    """One of ROLES."""
    name: str
    version: str
    architecture: str
    size: int
    """Bytes of the .deb file."""
    sha256: str
    title: str = ""
    licence: str = ""
    kind: str = ""
    """Kind of text that a held-out package stands for."""
    format: str = "document"
    """How its files are read: see `documents.READERS`."""
    include: tuple[str, ...] = ("usr/share/doc/**/*",)
    """Patterns of the files to read, relative to the package's root; `**` is any number of folders."""
    leave_out: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name that apt-get gives the file: the epoch's colon is written as %3a."""
        return f"{self.name}_{quote(self.version, safe='~+.-').replace('%3A', '%3a')}_{self.architecture}.deb"

    def wants(self, path: str) -> bool:
        """Whether a file of the package, by its path without leading "./", is read."""
        return any(_matches(path, p) for p in self.include) and not any(_matches(path, p) for p in self.leave_out)


def _matches(path: str, pattern: str) -> bool:
    """Match like pathlib's full_match (Python 3.13): `*` stays in a folder, `**/` crosses any number of them."""
    special = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]*\])", pattern)
    made = "".join(special.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    return re.fullmatch(made, path) is not None


def pinned(*, listing: Path = LIST, chosen: Path = CHOSEN) -> list[Package]:
    """Read the list of packages, with what is read from those that were chosen by hand."""
    details = tomllib.loads(chosen.read_text(encoding="utf-8"))
    packages = []
    for line in listing.read_text(encoding="utf-8").splitlines()[1:]:
        role, name, version, architecture, size, sha256 = line.split("\t")
        extra = details.get(role, {}).get(name, {})
        extra = {key: tuple(value) if isinstance(value, list) else value for key, value in extra.items()}
        packages.append(Package(role, name, version, architecture, int(size), sha256, **extra))
    return packages


def fetch(packages: list[Package], folder: Path) -> None:
    """Download the packages that `folder` does not hold yet, with `apt-get download`, and check every checksum.

    Raises UsageError naming the packages that are missing or damaged, and where else to get them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (folder / package.file).exists()]
    if missing:
        if shutil.which("apt-get") is None:
            raise UsageError(
                f"apt-get is not installed, and {folder} lacks {len(missing)} packages. {_by_hand(missing)}"
            )
        print(
            f"downloading {len(missing)} packages, {sum(p.size for p in missing) / 1e6:.0f} MB, to {folder}", flush=True
        )
        for at in range(0, len(missing), 40):
            _download(missing[at : at + 40], folder)
    absent = [package for package in packages if not (folder / package.file).exists()]
    if absent:
        raise UsageError(
            f"apt-get cannot download {len(absent)} of {len(packages)} packages in the pinned version. Run "
            f"`apt-get update` and try again on Debian 12. {_by_hand(absent)}"
        )
    for package in packages:
        found = sha256_of(folder / package.file)
        if found != package.sha256:
            raise UsageError(
                f"{folder / package.file} has sha256 {found}, expected {package.sha256}: delete it and run again"
            )


def _by_hand(packages: list[Package]) -> str:
    names = ", ".join(package.file for package in packages[:5]) + (", …" if len(packages) > 5 else "")
    return f"snapshot.debian.org keeps every version: put these files into the folder by hand: {names}"


def _download(packages: list[Package], folder: Path) -> None:
    wanted = [f"{package.name}:{package.architecture}={package.version}" for package in packages]
    wanted = [each.replace(":all=", "=") for each in wanted]
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    done = subprocess.run(["apt-get", *options, "download", *wanted], cwd=folder, capture_output=True, text=True)
    if done.returncode:  # one unknown version fails the whole call: those that are left are told by the caller
        for each in wanted:
            subprocess.run(["apt-get", *options, "download", each], cwd=folder, capture_output=True)


def files(package: Package, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the bytes of each wanted regular file in a package, decompressed, in the order of paths.

    Files above MAX_FILE bytes are left out. Raises UsageError if `dpkg-deb` is absent or cannot read the package.
    """
    if shutil.which("dpkg-deb") is None:
        raise UsageError("dpkg-deb, which opens Debian's packages, is not installed: run `apt-get install dpkg`")
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(folder / package.file)], capture_output=True)
    if done.returncode:
        raise UsageError(
            f"dpkg-deb cannot read {folder / package.file}: {done.stderr.decode(errors='replace').strip()}"
        )
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            path = member.name.removeprefix("./")
            if member.isfile() and member.size <= MAX_FILE and package.wants(path):
                content = archive.extractfile(member)
                assert content is not None
                found[path] = content.read()
    for path in sorted(found):
        data = _decompress(found[path]) if path.endswith((".gz", ".dz")) else found[path]
        if data is not None:
            yield path, data


def _decompress(data: bytes) -> bytes | None:
    """Return the content of a gzip file; None if it is damaged or above MAX_FILE bytes × 4."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(4 * MAX_FILE + 1)
    except (OSError, EOFError):
        return None
    return content if len(content) <= 4 * MAX_FILE else None

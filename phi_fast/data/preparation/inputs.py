"""Finds the inputs of `prepare` (files, folders, datasets), checks them before any work, and lists what is left out."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...terminal import printable
from ..remote_files import PATIENCE, Patience, find, is_url
from ..remote_files import stat as remote_stat
from ..signatures import HEAD_BYTES, container
from .containers import COMPRESSED, PrepareError, compression, head, require
from .hub_datasets import files_of, names_dataset
from .remote import AnyPath, RemotePath

Kind = Literal["text", "lines", "parquet", "dataset"]

LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".pq")
TEXT = (".txt", ".text", ".md", ".rst", ".tex")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".java", ".kt", ".scala", ".cs"),
    *(".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".swift", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml"),
    *(".sh", ".bash", ".sql", ".html", ".css", ".f90", ".m", ".ex", ".exs", ".erl", ".clj", ".dart", ".zig", ".v"),
)
FOLDER_SUFFIXES = (*TEXT, *CODE)
"""Suffixes of files in a folder that are one document each, besides the records in its JSONL and Parquet files."""

_UNREAD = {
    **dict.fromkeys((".csv", ".tsv"), "a table of separated values"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz", ".txz", ".7z", ".rar"), "an archive"),
    **dict.fromkeys((".lz4", ".br", ".sz", ".z"), "compressed in a way that is not read"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".rtf"), "a formatted document"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "a spreadsheet"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite"), "a table or database"),
    **dict.fromkeys((".bin", ".idx", ".ds", ".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors"), "binary data"),
}
"""Suffixes of files that are not plain text."""
_WAY_OUT = "give its texts as plain text files, JSONL or Parquet"


@dataclass(frozen=True)
class Input:
    """One file, or one dataset directory."""

    path: AnyPath
    kind: Kind
    size: int
    """Bytes, as it is stored."""
    compression: str | None = None
    """".gz", ".bz2", ".xz", ".lzma" or ".zst"; None: not compressed, or compressed inside its format."""

    @property
    def compressed(self) -> bool:
        return self.compression is not None

    @property
    def local(self) -> Path:
        """`path`, for what reads files of this machine alone. Raises PrepareError for a URL."""
        if isinstance(self.path, Path):
            return self.path
        raise PrepareError(f"{self.path}: expected a file on this machine; copy it here first")

    @property
    def local_stamp(self) -> tuple[str, int, int]:
        """Absolute path, size and modification time (ns): what tells whether a local file is still the same."""
        return str(self.local.absolute()), self.size, self.local.stat().st_mtime_ns


@dataclass(frozen=True)
class _Search:
    """What to look for in a folder."""

    suffixes: frozenset[str]
    """Suffixes of plain text files."""
    text_field: str


class _NotReadError(Exception):
    """A file is left out if it was found in a folder, and refused if the user named it; the message says why."""


@dataclass
class Inputs:
    """The inputs to read, and the files that are left out."""

    read: list[Input] = field(default_factory=list)
    left_out: list[tuple[AnyPath, str]] = field(default_factory=list)
    """(path, why)."""

    def summary(self) -> list[str]:
        """One line about the inputs, and one for each reason to leave files out, with the first few names."""
        names = {"text": "text", "lines": "JSON lines", "parquet": "Parquet", "dataset": "datasets"}
        counts = [f"{sum(entry.kind == kind for entry in self.read):,} {name}" for kind, name in names.items()]
        kinds = ", ".join(count for count in counts if not count.startswith("0 "))
        lines = [f"read {len(self.read):,} inputs: {kinds}"]
        reasons: dict[str, list[AnyPath]] = {}
        for path, reason in self.left_out:
            reasons.setdefault(reason, []).append(path)
        for reason, paths in sorted(reasons.items()):
            more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            lines.append(f"left out {len(paths):,}, {reason}: {printable(', '.join(map(str, paths[:5])))}{more}")
        return lines


def find_inputs(
    paths: Iterable[Path | str],
    suffixes: Iterable[str] = FOLDER_SUFFIXES,
    text_field: str = "text",
    patience: Patience = PATIENCE,
) -> Inputs:
    """Find the inputs at the paths: paths in the order given, and the files of a folder sorted by name.

    A text is a URL of a file, of a folder, or a pattern with `*`, whose files are treated as those of a folder.

    A folder that Hugging Face `datasets` saved is one dataset. Any other folder is searched, including links to
    folders: JSONL and Parquet files give records, and each file with one of `suffixes` is a document. Other files are
    left out and listed with the reason. A path that names a file which cannot be read is an error.

    Raises PrepareError for a path that is missing, empty or unreadable, or that needs a package that is not installed.
    """
    search = _Search(frozenset(suffix.lower() for suffix in suffixes), text_field)
    found = Inputs()
    for path in paths:
        before = len(found.read)
        remote = _remote(path, patience) if isinstance(path, str) else None
        if isinstance(remote, list):
            _add_files(remote, search, found)
        elif remote is not None or not _is_plain_folder(Path(path)):
            _add_named(remote or Path(path), search, found)
            continue
        else:
            _add_files(sorted(_walk(Path(path), found)), search, found)
        if len(found.read) == before:
            raise PrepareError(
                f"{path} holds no JSONL, Parquet, text or source file; say which with --suffixes .xyz"
                + "".join(f"\n{line}" for line in found.summary()[1:])
            )
    if not found.read:
        raise PrepareError("there is nothing in the inputs: name files or folders that hold text")
    return found


_EMPTY = "empty"


def _remote(url: str, patience: Patience) -> RemotePath | list[RemotePath]:
    """The file at a URL, or the files of the folder or pattern there. Raises RemoteError, PrepareError for no URL."""
    if not is_url(url):
        raise PrepareError(f"{url!r} is not a URL that is read: give paths as Path")
    if names_dataset(url):
        with ThreadPoolExecutor(16) as pool:
            urls = files_of(url, patience)
            found = list(pool.map(lambda name: remote_stat(name, patience), urls))
        return [RemotePath.of(name, status, patience) for name, status in zip(urls, found, strict=True) if status]
    status = None if "*" in url and not url.startswith("http") else remote_stat(url, patience)
    if status is not None:
        return RemotePath.of(url, status, patience)
    files = [RemotePath.of(name, found, patience) for name, found in find(url, patience).items()]
    if not files:
        raise PrepareError(f"{url} holds no files: check the address")
    return [file for file in files if not any(part.startswith(".") for part in file.url.split("/"))]


def _add_named(path: AnyPath, search: _Search, found: Inputs) -> None:
    """Add a file that the user named. Raises PrepareError if it cannot be read."""
    try:
        found.read.append(_input(path, search, named=True))
    except _NotReadError as reason:
        if str(reason) != _EMPTY:
            raise PrepareError(f"{path} is {reason}") from None
        found.left_out.append((path, str(reason)))


def _add_files(files: Sequence[AnyPath], search: _Search, found: Inputs) -> None:
    """Add the files of a folder, in the order given; what is not read is listed."""
    with ThreadPoolExecutor(16) as pool:  # their beginnings are requested at once, and in turn below
        for file in files:
            if isinstance(file, RemotePath) and file.size and file.suffix.lower() not in (*TABLES, *_UNREAD):
                pool.submit(file.head, HEAD_BYTES)
    for file in files:
        try:
            found.read.append(_input(file, search, named=False))
        except _NotReadError as reason:
            found.left_out.append((file, str(reason)))


def _input(path: AnyPath, search: _Search, *, named: bool) -> Input:
    """The input for a file: its name determines how it is read, and its first bytes must not contradict that.

    named: whether the user named the file; then a name without a known suffix means text.
    Raises _NotReadError, and PrepareError for an error that also counts in a folder.
    """
    if isinstance(path, Path) and path.is_dir():
        require("datasets", f"{path} (a Hugging Face dataset)")
        return Input(path, "dataset", sum(file.stat().st_size for file in path.glob("*.arrow")))
    known, size = search.suffixes, _check_file(path)
    packed = compression(path)
    suffix = (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()
    if suffix in TABLES and packed is None:
        require("pyarrow", f"{path} (Parquet)")
        return Input(path, "parquet", size)
    if suffix in _UNREAD and suffix not in known:
        raise _NotReadError(f"{_UNREAD[suffix]} ({suffix}): {_WAY_OUT}; or read it as text with --suffixes {suffix}")
    kind: Kind = "lines" if suffix in LINES and suffix not in known else "text"
    if kind == "text" and not named and suffix not in known:
        raise _NotReadError(f"not read from folders ({suffix or 'no suffix'}); --suffixes adds suffixes")
    first = head(path, packed)
    if (what := container(first)) is not None:
        raise _NotReadError(f"{what}, whatever its name: {_WAY_OUT}")
    if kind == "text" and suffix not in known and b"\0" in first:
        raise _NotReadError(f"binary data: {_WAY_OUT}")
    if suffix == ".json" and kind == "lines":
        _check_records(first, None if named else search.text_field)
    return Input(path, kind, size, packed)


def _check_file(path: AnyPath) -> int:
    """The size of a regular file that is not empty. Raises _NotReadError, and PrepareError if it cannot be read."""
    if isinstance(path, RemotePath):
        if not path.size:
            raise _NotReadError(_EMPTY)
        return path.size
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise _NotReadError("a link that leads nowhere") from None
        raise PrepareError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise _NotReadError("a pipe or a device, which cannot be read again after an interruption: name a file")
    if not status.st_size:
        raise _NotReadError(_EMPTY)
    if not os.access(path, os.R_OK):
        raise PrepareError(f"{path} cannot be read: permission denied")
    return status.st_size


def _check_records(first: bytes, text_field: str | None) -> None:
    """Check that the first bytes of a .json file have one object per line, as in JSONL.

    text_field: a field that the first object must have; None to check that later, when it is an error.
    Raises _NotReadError.
    """
    line, end, _ = first.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not end and len(first) == HEAD_BYTES and line.startswith(b"{"):
        return  # the record is longer than these bytes
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        # A malformed record is reported when it is read.
        record = {text_field: ""} if line.startswith(b"{") and line.rstrip().endswith(b"}") else None
    if not isinstance(record, dict):
        raise _NotReadError("one JSON value, not a record per line: `jq -c '.[]' OLD.json > NEW.jsonl` makes records")
    if text_field is not None and text_field not in record:
        raise _NotReadError(f"without a field {text_field!r} in its first record (--text-field names another)")


def _is_plain_folder(path: Path) -> bool:
    if not path.exists() and not path.is_symlink():
        raise PrepareError(f"{path} does not exist")
    if not path.is_dir():
        return False
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").exists())
        raise PrepareError(
            f"{path} holds the splits {', '.join(splits)}: name those you want, such as {path / splits[0]}"
        )
    return not (path / "state.json").exists()


def _walk(folder: Path, found: Inputs) -> Iterator[Path]:
    """Files and saved datasets below a folder. Every folder is searched once, even if several links lead to it."""
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, folder.resolve().parents)}
    for parent, directories, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            found.left_out.append((Path(parent), "a link to a folder that is read already or contains the link"))
            directories.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if "state.json" in files and any(name.endswith(".arrow") for name in files):
            directories.clear()
            yield Path(parent)
            continue
        hidden = [name for name in (*directories, *files) if name.startswith(".") or name == "__pycache__"]
        found.left_out += [(Path(parent, name), "hidden") for name in sorted(hidden)]
        directories[:] = sorted(
            (name for name in directories if name not in hidden),
            key=lambda name: (Path(parent, name).is_symlink(), name),
        )
        yield from (Path(parent, name) for name in files if name not in hidden)


def _unreadable(error: OSError) -> None:
    raise PrepareError(f"{error.filename} cannot be read: {error.strerror}")

"""What `prepare` is given: files, folders and datasets, found and checked before any work."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["text", "lines", "parquet", "dataset"]

LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst")
TEXT = (".txt", ".text", ".md", ".rst", ".tex")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".java", ".kt", ".scala", ".cs"),
    *(".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".swift", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml"),
    *(".sh", ".bash", ".sql", ".html", ".css", ".f90", ".m", ".ex", ".exs", ".erl", ".clj", ".dart", ".zig", ".v"),
)
FOLDER_SUFFIXES = (*TEXT, *CODE)
"""Files that a folder gives as one document each, besides the records in its JSONL and Parquet files."""


class PrepareError(ValueError):
    """An input or an option that `prepare` cannot work with; the message says what to do."""


@dataclass(frozen=True)
class Input:
    """One file, or one dataset directory."""

    path: Path
    kind: Kind
    size: int
    """Bytes on disk."""

    @property
    def compressed(self) -> bool:
        return self.path.suffix in COMPRESSED


def find_inputs(paths: Iterable[Path], suffixes: Iterable[str] = FOLDER_SUFFIXES) -> list[Input]:
    """The inputs that the paths name: files in the order given, those of a folder by name.

    A folder that Hugging Face `datasets` saved is one dataset. Any other is walked: JSONL and Parquet files give
    records, files with one of `suffixes` a document each; what else lies there, and hidden files, are left out.

    Raises PrepareError for a path that is missing, empty or unreadable, or that needs a package that is not installed.
    """
    inputs = []
    for path in paths:
        found = sorted(_walk(path, frozenset(suffixes))) if _is_plain_folder(path) else [path]
        if not found:
            raise PrepareError(f"{path} holds no JSONL, Parquet, text or source file; say which with --suffixes .xyz")
        inputs += [Input(file, kind(file), _size(file)) for file in found]
    inputs = [entry for entry in inputs if entry.size]
    if not inputs:
        raise PrepareError("there is nothing in the inputs: name files or folders that hold text")
    for entry in inputs:
        _check_readable(entry)
    return inputs


def kind(path: Path) -> Kind:
    """How a path is read, by its name; a directory is a dataset. A name without a known suffix is text."""
    if path.is_dir():
        return "dataset"
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if suffix == ".parquet":
        return "parquet"
    return "lines" if suffix in LINES else "text"


def fingerprint(inputs: list[Input]) -> str:
    """Hex sha256 of the inputs' paths, sizes and times of change."""
    hashed = hashlib.sha256()
    for entry in inputs:
        hashed.update(
            f"{entry.path.absolute()}\0{entry.size}\0{entry.path.stat().st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return hashed.hexdigest()


def require(module: str, what: str) -> None:
    """Raise PrepareError unless the package is installed."""
    if importlib.util.find_spec(module) is None:
        raise PrepareError(f"{what} needs {module}, which is not installed: pip install 'phi-fast[prepare]'")


def _is_plain_folder(path: Path) -> bool:
    if not path.exists():
        raise PrepareError(f"{path} does not exist")
    if not path.is_dir():
        return False
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").exists())
        raise PrepareError(
            f"{path} holds the splits {', '.join(splits)}: name those you want, such as {path / splits[0]}"
        )
    return not (path / "state.json").exists()


def _walk(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    for parent, directories, files in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            path = Path(parent, name)
            plain = path.with_suffix("") if path.suffix in COMPRESSED else path
            if not name.startswith(".") and (
                plain.suffix in suffixes or plain.suffix in (".jsonl", ".ndjson", ".parquet")
            ):
                yield path


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.arrow"))
    return path.stat().st_size


def _check_readable(entry: Input) -> None:
    if entry.kind == "dataset":
        require("datasets", f"{entry.path} (a Hugging Face dataset)")
    elif entry.kind == "parquet":
        require("pyarrow", f"{entry.path} (Parquet)")
    elif entry.path.suffix == ".zst":
        require("pyarrow", f"{entry.path} (Zstandard)")
    if not os.access(entry.path, os.R_OK):
        raise PrepareError(f"{entry.path} cannot be read: permission denied")

"""Reads files from an untrusted folder: names and links must not lead out of it, and no read may block."""

from __future__ import annotations

import stat
from pathlib import Path

from ..json_files import Fields, JsonFileError, read_json, read_regular
from .errors import ConversionError, ModelFileError

WAY_OUT = "Get it again"


def find(folder: Path, name: str) -> Path | None:
    """The regular file `name` in `folder`; None if there is none.

    Raises ConversionError if the name or a link leads out of the folder, and for a FIFO, a device or a folder.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a NUL
        raise ConversionError(f"{folder} names {name!r}, which cannot be opened: {error}") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ConversionError(
            f"{path} leads to {target}, outside of its folder, and is not read: if that file belongs to the model, "
            f"copy it into {folder}"
        )
    if not stat.S_ISREG(target.stat().st_mode):
        raise ConversionError(f"{path} is no regular file. {WAY_OUT}")
    return path


def read_text(path: Path, max_bytes: int = 4096) -> str:
    """Read a short text file that `find` found. Raises ConversionError if it is not UTF-8 or is too long."""
    try:
        return read_regular(path, max_bytes).decode()
    except (JsonFileError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not a short text: {error}. {WAY_OUT}") from error


def read_fields(folder: Path, name: str) -> Fields | None:
    """Read the JSON object in a file of `folder`; None if there is no such file.

    Raises ConversionError as `find` does, and if the file is not a JSON object.
    """
    path = find(folder, name)
    if path is None:
        return None
    try:
        value = read_json(path)
    except JsonFileError as error:
        raise ModelFileError(f"{error}. {WAY_OUT}") from error
    return Fields.of(value, str(path), WAY_OUT, ModelFileError)


def _roots(folder: Path) -> list[Path]:
    """Where files of `folder` may lie: in it, and, in the hub's cache, in `blobs`, to which its snapshots link."""
    here = folder.resolve()
    blobs = here.parent.parent / "blobs"
    return [here, blobs] if here.parent.name == "snapshots" and blobs.is_dir() else [here]

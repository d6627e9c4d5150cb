"""Files of a folder that somebody else made: no name and no link in it leads out of it, and reading one never waits."""

from __future__ import annotations

import stat
from pathlib import Path

from ..json_files import Fields, JsonFileError, read_json, read_regular
from .errors import ConversionError, ModelFileError

WAY_OUT = "Get it again"


def find(folder: Path, name: str) -> Path | None:
    """The regular file `name` of `folder`; None where there is none.

    Raises ConversionError where the name or a link leads out of the folder, and for a FIFO, a device or a folder.
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
            f"{path} leads to {target}, outside of its folder, and is not read: copy that file into {folder} if it is "
            "the model's"
        )
    if not stat.S_ISREG(target.stat().st_mode):
        raise ConversionError(f"{path} is no regular file. {WAY_OUT}")
    return path


def read_text(path: Path, max_bytes: int = 4096) -> str:
    """A short text that `find` found. Raises ConversionError where it is none."""
    try:
        return read_regular(path, max_bytes).decode()
    except (JsonFileError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is no text that it should be: {error}. {WAY_OUT}") from error


def read_fields(folder: Path, name: str) -> Fields | None:
    """The JSON object in a file of `folder`, for typed reads; None where there is no such file.

    Raises ConversionError as `find` does, and where the file holds no JSON object.
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
    """Where files of `folder` may lie: in it, and in the hub's cache, whose snapshots are links, among its blobs."""
    here = folder.resolve()
    blobs = here.parent.parent / "blobs"
    return [here, blobs] if here.parent.name == "snapshots" and blobs.is_dir() else [here]

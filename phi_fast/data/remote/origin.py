"""Where the files of a cached corpus come from: `remote.json` in its folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ...files import write_atomically
from ...json_files import read_object
from ..remote_files import SCHEMES

FILE_NAME = "remote.json"
_URL = re.compile(f"({'|'.join(SCHEMES)}):/{{1,2}}([^/].*)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """The remote corpus of which a folder is a cache: its token files are sparse, and filled while they are read."""

    url: str
    """URL of the corpus directory, without a slash at the end."""

    def file(self, name: str) -> str:
        """URL of one of its files."""
        return f"{self.url}/{name}"

    def write(self, directory: Path) -> None:
        write_atomically(directory / FILE_NAME, json.dumps({"url": self.url}).encode())

    @staticmethod
    def read(directory: Path) -> Origin | None:
        """The origin of a folder; None if the folder holds the corpus itself. Raises JsonFileError."""
        path = directory / FILE_NAME
        if not path.exists():
            return None
        return Origin(read_object(path, way_out=f"Remove {directory}").text("url"))


def url_of(path: Path | str) -> str | None:
    """The URL that `path` is; None for a local path.

    A Path keeps only one of the slashes in "s3://bucket/key"; it is put back.
    """
    match = _URL.fullmatch(str(path))
    return None if match is None else f"{match[1].lower()}://{match[2]}"

"""The output folder of a conversion: a new one, or one that holds only files that an earlier conversion wrote.

A hidden file in it lists the written files with their hashes. If anything else lies there, or a file was changed, the
conversion changes nothing in the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..files import sha256_of, sync_directory, sync_file, write_atomically
from . import inside
from .errors import ConversionError

MARK = ".phi_fast-convert.json"
ASIDE = ".phi_fast-aside-"
"""Prefix of the names of temporary folders, from which files are moved into their place."""
_SHOWN = 8


def check(out: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    """Raise ConversionError if `out` cannot be written, or holds more than an earlier conversion's result.

    sources: the files and folders that the conversion reads.
    """
    if not out.exists():
        if out.is_symlink():
            raise ConversionError(f"{out} is a link to {out.readlink()}, which does not exist; name another folder")
        return
    if not out.is_dir():
        raise ConversionError(f"{out} is a file; name another folder")
    if not overwrite:
        raise ConversionError(f"{out} exists; name another folder, or add --overwrite to replace it")
    here = out.resolve()
    inner = [source for source in sources if source.resolve().is_relative_to(here)]
    if inner:
        raise ConversionError(f"{out} holds the source, {inner[0]}: it would replace itself; name another folder")
    written = _written(out)
    foreign = sorted(path.name for path in out.iterdir() if not _is_ours(path, written))
    if foreign:
        shown = ", ".join(foreign[:_SHOWN]) + ", …" * (len(foreign) > _SHOWN)
        raise ConversionError(
            f"{out} holds files that no conversion wrote, or that were changed since: {shown}. --overwrite replaces "
            "only what convert wrote: move these away, or name another folder"
        )


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into an empty temporary folder, and move its files to `out`, which has passed `check`.

    If `fill` raises, `out` does not change. If the process dies while files are moved, each file is either the old or
    the new one, and the next conversion can replace them.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name[:100]}."))
    else:
        for left in out.glob(f"{ASIDE}*"):
            shutil.rmtree(left)
        aside = Path(tempfile.mkdtemp(dir=out, prefix=ASIDE))
    try:
        new = aside / "new"
        new.mkdir()
        fill(new)
        files = {}
        for path in sorted(new.iterdir()):
            sync_file(path)
            files[path.name] = [sha256_of(path)]
        if out.exists():
            _move_into(out, new, files)
        else:
            _mark(new, new, files)
            new.rename(out)
            sync_directory(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_into(out: Path, new: Path, files: dict[str, list[str]]) -> None:
    old = _written(out)
    either = {name: old.get(name, []) + files.get(name, []) for name in {**old, **files}}
    _mark(out, new, either)
    for name in files:
        (new / name).replace(out / name)
    for path in list(out.iterdir()):
        if path.name not in files and path.name != MARK and path.name in old:
            path.unlink()
    _mark(out, new, files)
    sync_directory(out)


def _written(out: Path) -> dict[str, list[str]]:
    """File name -> hashes, from the hidden file of an earlier conversion; empty if there is none."""
    mark = inside.read_fields(out, MARK)
    if mark is None:
        return {}
    files = mark.inner("files")
    return {name: list(files.texts(name)) for name in files.values}


def _is_ours(path: Path, written: dict[str, list[str]]) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name.startswith(ASIDE)
    return path.name == MARK or (path.name in written and path.is_file() and sha256_of(path) in written[path.name])


def _mark(out: Path, aside: Path, files: dict[str, list[str]]) -> None:
    """Write the list in `aside` and move it to `out`, so that a kill leaves no partial file in `out`."""
    document = {"written_by": "python -m phi_fast.convert", "files": files}
    write_atomically(aside / MARK, json.dumps(document, indent=1).encode() + b"\n")
    (aside / MARK).replace(out / MARK)

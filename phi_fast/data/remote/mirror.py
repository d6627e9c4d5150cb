"""Makes the local folder of a remote corpus: its small files, and sparse token files that are filled while they are
read. To the code that opens corpora it is a corpus directory like any other."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from ...errors import UsageError
from ...files import write_atomically, writing
from ...json_files import parse_json
from ..manifest import FILE_NAME, MAX_MANIFEST_BYTES, Manifest, ManifestError, Split, parse_manifest
from ..remote_files import RemoteError, read_range, stat
from .block_index import BlockIndex
from .cache import DataCache
from .origin import Origin, url_of

SMALL_FILES = {"tokenizer.json": 2**28, "tokenizer_config.json": 2**20, "chat_template.jinja": 2**20}
"""Files that a corpus may have beside its tokens, and the largest size accepted."""


def remote_corpus(url: str, cache: DataCache | None = None) -> Path:
    """The folder in `cache` of the corpus at `url`, made unless it exists: a path for a `Mixture`.

    cache: None: `DataCache.default()`. Any number of processes may call this at once.
    Reads the manifest, sizes, and the last document end; tokens are read later, as the loader needs them.
    Raises UsageError (ManifestError, RemoteError) if there is no corpus, or its files do not fit its manifest.
    """
    if (found := url_of(url)) is None:
        raise UsageError(f"{url!r} is not a URL such as s3://bucket/corpus")
    url, cache = found.rstrip("/"), cache or DataCache.default()
    if "?" in url or "#" in url:
        raise UsageError(f"{url}: a corpus is a folder of several files, whose URL has no query: leave it out")
    origin = Origin(url)
    where = origin.file(FILE_NAME)
    data = _small(where, MAX_MANIFEST_BYTES, "`python -m phi_fast.prepare` makes a corpus; upload its folder as it is")
    manifest = parse_manifest(parse_json(data, where), where)
    sizes: dict[str, int] = {}
    for name, split in manifest.splits.items():
        sizes |= _expected_sizes(origin, manifest, name, split)
    for name, expected in sizes.items():
        if (found_size := _size(origin.file(name))) != expected:
            raise RemoteError(
                f"{origin.file(name)} has {found_size} bytes, and the manifest says {expected}: it was "
                f"{'cut short' if found_size < expected else 'changed'}. Copy or prepare the corpus again"
            )
    digest = hashlib.sha256(f"{url}\n{cache.block_bytes}\n".encode() + data).hexdigest()
    folder = cache.directory / f"{re.sub('[^A-Za-z0-9]+', '-', url.rpartition('/')[2])[:40]}-{digest[:16]}"
    there = sum(BlockIndex.open(path).bytes for path in folder.glob("*.index"))
    cache.check_disk(sum(sizes.values()) - there)
    if not (folder / FILE_NAME).exists():
        small = {
            name: _small(origin.file(name), most, "") for name, most in SMALL_FILES.items() if _has(origin.file(name))
        }
        ends = {split.ends: _last_end(origin, split) for split in manifest.splits.values()}
        with writing(folder, "make room on its disk, or name another folder with --data-cache"):
            _make(cache, folder, origin, {**small, FILE_NAME: data}, sizes, ends)
    Manifest.read(folder)
    return folder


def _make(
    cache: DataCache,
    folder: Path,
    origin: Origin,
    small: dict[str, bytes],
    sizes: dict[str, int],
    ends: dict[str, bytes],
) -> None:
    """Make the folder under another name, then rename it; if another process was first, its folder stays."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for name, data in small.items():
            write_atomically(aside / name, data)
        for name, size in sizes.items():
            with (aside / name).open("wb") as file:
                file.truncate(size)
                if name in ends:
                    file.seek(size - len(ends[name]))
                    file.write(ends[name])
            if name not in ends:
                BlockIndex.create(aside / f"{name}.index", cache.block_bytes, size)
        try:
            Manifest.read(aside)
        except ManifestError as error:
            raise ManifestError(str(error).replace(str(aside), origin.url)) from None
        origin.write(aside)
        with cache.locked():
            if not folder.exists():
                aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _expected_sizes(origin: Origin, manifest: Manifest, name: str, split: Split) -> dict[str, int]:
    """Size of each of a split's files, by name. Raises UsageError for names that lead out of the corpus."""
    width = manifest.numpy_dtype.itemsize
    sizes = {split.file: split.offset + split.tokens * width, split.ends: 8 * split.documents}
    if split.marks is not None:
        sizes[split.marks] = split.tokens
    for file in sizes:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", file) or file in (*SMALL_FILES, FILE_NAME):
            raise UsageError(
                f"{origin.file(FILE_NAME)}: {name} has the file {file!r}, which is no plain name beside the manifest: "
                "a remote corpus holds its own tokens (`prepare --adopt` only points to them). Prepare it again"
            )
    return sizes


def _last_end(origin: Origin, split: Split) -> bytes:
    """The last document end, the only one that is read, of 8 bytes."""
    return read_range(origin.file(split.ends), 8 * (split.documents - 1), 8 * split.documents)


def _small(url: str, most: int, way_out: str) -> bytes:
    """Read a whole file. Raises RemoteError if it is missing or larger than `most` bytes."""
    try:
        size = _size(url)
    except RemoteError as error:
        raise RemoteError(f"{error}. {way_out}") from error.__cause__
    if size > most:
        raise RemoteError(f"{url} has {size} bytes, expected at most {most}: it is another file")
    return read_range(url, 0, size) if size else b""


def _has(url: str) -> bool:
    """Whether there is a file. S3 answers as if access were refused where a key's absence may not be known."""
    try:
        return stat(url) is not None
    except RemoteError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | PermissionError) or getattr(cause, "status", 0) in (403, 404, 410):
            return False
        raise


def _size(url: str) -> int:
    """The size of a file in bytes. Raises RemoteError if there is none."""
    if (found := stat(url)) is None:
        raise RemoteError(f"{url} is a folder, expected a file")
    return found.size

"""Files that `prepare` reads, leaves out with a reason, or refuses: by name and by content."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation.inputs import PrepareError, find_inputs
from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.prepare import main

TEXTS = [f"document {i}" for i in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd_frame(data: bytes, window_log: int) -> bytes:
    """A Zstandard frame with one raw block and any window (RFC 8878, 3.1.1): magic, descriptor, window, block, data."""
    block = (len(data) << 3 | 1).to_bytes(3, "little")  # the last one, type 0: raw
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block + data


def documents_of(paths: list[Path], tmp_path: Path, tokenizer: Path, **options: object) -> int:
    chosen = Settings(str(tokenizer), validation=0, **options)  # type: ignore[arg-type]
    manifest = prepare(paths, tmp_path / "out", chosen, workers=1, console=Console(quiet=True))
    return manifest.splits["train"].documents


FILES: dict[str, bytes] = {
    "A.JSONL": LINES,
    "a.Json": LINES,
    "a.ndjson": LINES,
    "a.json.gz": gzip.compress(LINES),
    "a.JSONL.GZ": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.lzma": lzma.compress(LINES, lzma.FORMAT_ALONE),
    "a.jsonl.zst": zstd_frame(LINES, 20),
    "long window.jsonl.zst": zstd_frame(LINES[:800], 31) + zstd_frame(LINES[800:], 31),
    "gzip by its content.jsonl": gzip.compress(LINES),
    "bzip2 by its content.jsonl": bz2.compress(LINES),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_records_gives_its_records(tmp_path: Path, small_tokenizer: Path, name: str) -> None:
    """Also with --skip-malformed, which used to count a file of 400 documents as one malformed record."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(FILES[name])
    assert documents_of([tmp_path / "folder" / name], tmp_path / "1", small_tokenizer, skip_malformed=True) == len(
        TEXTS
    )
    assert documents_of([tmp_path / "folder"], tmp_path / "2", small_tokenizer) == len(TEXTS)


def tar(suffix: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return gzip.compress(packed.getvalue()) if suffix == "gz" else packed.getvalue()


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "text")
    return packed.getvalue()


REFUSED: dict[str, tuple[bytes, str]] = {
    "a.csv": (b"id,text\n1,hello\n", r"a\.csv is a table of separated values .*--suffixes \.csv"),
    "a.CSV.gz": (gzip.compress(b"id,text\n1,hello\n"), "is a table of separated values"),
    "a.zip": (zipped(), "is an archive"),
    "zip.txt": (zipped(), "is a zip archive .* whatever its name"),
    "zip.jsonl": (zipped(), "is a zip archive"),
    "a.tar.gz": (tar("gz"), "is an archive"),
    "tar by content": (tar(""), "is a tar archive"),
    "tar.gz by content.gz": (tar("gz"), "is a tar archive"),
    "a.txt.lz4": (b"\x04\x22\x4d\x18" + bytes(20), r"compressed in a way that is not read \(\.lz4\)"),
    "lz4.txt": (b"\x04\x22\x4d\x18" + bytes(20), "is an lz4 file"),
    "parquet.txt": (b"PAR1" + bytes(50), "is a Parquet file, whatever its name"),
    "a.pdf": (b"%PDF-1.7\n", "is a formatted document"),
    "model.safetensors": (bytes(50), "is binary data"),
    "unknown": (b"ab\0cd", "is binary data"),
    "array.json": (b'[{"text": "a"}]', r"is one JSON value, not a record per line: `jq -c '\.\[\]'"),
    "pretty.json": (b'{\n "text": "a"\n}\n', "is one JSON value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_where_it_is_named_and_listed_in_a_folder(tmp_path: Path, name: str) -> None:
    data, message = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PrepareError, match=message):
        find_inputs([tmp_path / name])
    (tmp_path / "good.txt").write_text("text")
    found = find_inputs([tmp_path])
    assert [entry.path.name for entry in found.read] == ["good.txt"]
    assert [path.name for path, _ in found.left_out] == [name]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_a_pipe_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "pipe.jsonl")
    with pytest.raises(PrepareError, match="is a pipe or a device, which cannot be read again"):
        find_inputs([tmp_path / "pipe.jsonl"])


def test_a_csv_is_text_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text("id,text\n")
    assert find_inputs([tmp_path], [".csv"]).read[0].kind == "text"
    assert find_inputs([tmp_path / "a.CSV"], [".csv"]).read[0].kind == "text"


def test_a_folder_is_walked_once_and_what_is_left_out_is_named(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for directory in (folder, other, folder / "real"):
        directory.mkdir()
    (other / "linked.md").write_text("linked")
    (folder / "real" / "a.txt").write_text("real")
    (folder / "away").symlink_to(other)
    (folder / "again").symlink_to(folder / "real")
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n")
    (folder / ".hidden").write_text("x")
    (folder / "empty.txt").write_text("")
    (folder / "package.json").write_text('{"name": "x"}')
    for i in range(7):
        (folder / f"{i}.xyz").write_text("x")
    os.mkfifo(folder / "pipe.txt")
    assert main([str(folder), "--tokenizer", str(small_tokenizer), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert Manifest.read(tmp_path / "out").splits["train"].documents == 2
    assert "read 2 inputs: 2 text" in printed
    lines = [line for line in printed.splitlines() if line.startswith("left out")]
    for count, reason, names in [
        (3, "a link to a folder that is read already or contains the link", ["again", "loop", "up"]),
        (1, "a link that leads nowhere", ["broken.txt"]),
        (1, "not read from folders (.png)", ["image.png"]),
        (7, "not read from folders (.xyz)", ["0.xyz", "4.xyz and 2 more"]),
        (1, "hidden", [".hidden"]),
        (1, "empty", ["empty.txt"]),
        (1, "without a field 'text' in its first record", ["package.json"]),
        (1, "a pipe or a device", ["pipe.txt"]),
    ]:
        (line,) = [line for line in lines if line.startswith(f"left out {count}, {reason}")]
        assert all(name in line for name in names)
    assert len(lines) == 8


def test_a_saved_dataset_inside_a_folder_is_read(tmp_path: Path, small_tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "folder" / "saved")
    (tmp_path / "folder" / "a.txt").write_text("one")
    assert documents_of([tmp_path / "folder"], tmp_path, small_tokenizer) == len(TEXTS) + 1


def invalid_strings() -> object:
    """An Arrow array of strings, the second of which is not UTF-8."""
    arrow = pytest.importorskip("pyarrow")
    stored = arrow.array([b"good", b"\xff\xfe", b"fine"], arrow.binary())
    return arrow.Array.from_buffers(arrow.string(), 3, stored.buffers())


def write_bad_parquet(path: Path) -> Path:
    pytest.importorskip("pyarrow.parquet").write_table(
        pytest.importorskip("pyarrow").table({"text": invalid_strings()}), path / "a.parquet"
    )
    return path / "a.parquet"


def write_bad_dataset(path: Path) -> Path:
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    datasets.disable_progress_bars()
    datasets.Dataset(arrow.table({"text": invalid_strings()})).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("write", [write_bad_parquet, write_bad_dataset])
def test_a_string_of_a_table_that_is_not_utf8_is_one_malformed_record(
    tmp_path: Path, small_tokenizer: Path, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    with pytest.raises(PrepareError, match=r"row 1: 'utf-8' codec can't decode.*--skip-malformed"):
        documents_of([path], tmp_path, small_tokenizer)
    assert documents_of([path], tmp_path, small_tokenizer, skip_malformed=True) == 2


def test_a_zstandard_file_with_a_damaged_frame(tmp_path: Path, small_tokenizer: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_frame(LINES, 20) + b"\x28\xb5\x2f\xfd" + struct.pack("<I", 7) * 9)
    with pytest.raises(PrepareError, match=r"a\.jsonl\.zst is damaged: "):
        documents_of([tmp_path / "a.jsonl.zst"], tmp_path, small_tokenizer)

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from phi_fast.data.manifest import FILE_NAME, Delimiter, Manifest, ManifestError, Split

BLOCK = 64  # bytes: several blocks in a small file


def write_corpus(directory: Path, *, dtype: str = "uint16", header: bytes = b"") -> Manifest:
    """Two splits of three documents each, in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, size in (("train", 100), ("validation", 40)):
        tokens = np.random.default_rng(size).integers(0, 50, size).astype(dtype)
        tokens[7] = 50
        ends = np.array([10, 11, size], "<u8")
        data = tokens.tobytes()
        (directory / f"{name}.bin").write_bytes(header + data)
        (directory / f"{name}.ends").write_bytes(ends.tobytes())
        splits[name] = Split(
            file=f"{name}.bin",
            ends=f"{name}.ends",
            tokens=size,
            documents=3,
            max_id=50,
            sha256=tuple(hashlib.sha256(data[at : at + BLOCK]).hexdigest() for at in range(0, len(data), BLOCK)),
            block_bytes=BLOCK,
            offset=len(header),
        )
    manifest = Manifest(dtype, "tests", "0" * 64, 51, Delimiter(0), splits)
    manifest.write(directory)
    return manifest


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("header", [b"", b"header.."])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, header: bytes) -> None:
    manifest = write_corpus(tmp_path, dtype=dtype, header=header)
    assert Manifest.read(tmp_path) == manifest
    manifest.verify(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "train.bin",
        "train.ends",
        "validation.bin",
        "validation.ends",
    ]


def test_the_json_is_the_documented_one(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    document = json.loads((tmp_path / FILE_NAME).read_text())
    assert document["format"] == "phi_fast tokens"
    assert document["version"] == 1
    assert document["dtype"] == "uint16"
    assert document["delimiter"] == {"id": 0, "side": "after"}
    assert set(document["splits"]["train"]) == {
        "file",
        "ends",
        "tokens",
        "documents",
        "max_id",
        "block_bytes",
        "sha256",
    }


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, other = write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b", header=b"moved")
    assert one.fingerprint("train") == other.fingerprint("train") != one.fingerprint("validation")
    wide = write_corpus(tmp_path / "c", dtype="uint32")
    assert wide.fingerprint("train") != one.fingerprint("train")


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'test' is not in this corpus, which has 'train', 'validation'"):
        write_corpus(tmp_path).split("test")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "megatron", "format is 'megatron', expected 'phi_fast tokens'"),
        ("version", 3, "version is 3, this phi_fast reads 1 and 2"),
        ("dtype", "int32", "dtype is 'int32', expected one of 'uint16', 'uint32'"),
        ("vocab_size", 0, "vocab_size is 0, expected an integer of at least 1"),
        ("vocab_size", 50, "train has id 50, and tokenizer 'tests' has only 50 ids"),
        ("tokenizer", None, "tokenizer is None, expected a string"),
        ("delimiter", {"id": -1, "side": "after"}, "delimiter.id is -1"),
        ("delimiter", {"id": 1, "side": "left"}, "delimiter.side is 'left'"),
        ("splits", {}, "splits is empty"),
        ("splits", [], "splits is \\[\\], expected an object"),
        ("splits.train.tokens", 101, "train.bin has 200 bytes, and 101 uint16 tokens take 202: the file was cut short"),
        ("splits.train.tokens", True, "splits.train.tokens is True, expected an integer"),
        ("splits.train.tokens", 2**63, "expected an integer of at least 1"),
        ("splits.train.documents", 2, "train.ends has 24 bytes, and 2 document ends take 16: the file was changed"),
        ("splits.train.sha256", ["0"], "train has 1 checksums for 4 blocks of 64 bytes"),
        ("splits.train.sha256", "0", "sha256 is '0', expected a list of strings"),
        ("splits.train.block_bytes", 3, "block_bytes is 3, expected an integer of at least 4"),
        ("splits.train.file", "gone.bin", "gone.bin: No such file"),
    ],
)
def test_every_wrong_field_is_named(tmp_path: Path, field: str, value: object, message: str) -> None:
    write_corpus(tmp_path)
    document = json.loads((tmp_path / FILE_NAME).read_text())
    *parents, last = field.split(".")
    inner = document
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format": ', "\xff"])
def test_a_manifest_that_is_not_one(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is not a complete corpus.*phi_fast\.prepare"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("file", "byte", "message"),
    [
        ("train.bin", 150, r"train\.bin: block 2 \(from byte 128\) has sha256"),
        ("train.ends", 8, "document ends do not ascend"),
        ("train.ends", 16, "the last document ends at token"),
    ],
)
def test_verify_finds_one_changed_byte(tmp_path: Path, file: str, byte: int, message: str) -> None:
    manifest = write_corpus(tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    data[byte] ^= 0xFF if file == "train.bin" else 0x01 if byte == 8 else 0xFF
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ManifestError, match=message):
        manifest.verify(tmp_path)


def test_verify_finds_a_wrong_largest_id(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path)
    train = dataclasses.replace(manifest.splits["train"], max_id=49)
    with pytest.raises(ManifestError, match="largest id of train is 50, the manifest says 49"):
        dataclasses.replace(manifest, splits={"train": train}).verify(tmp_path)


def elsewhere(tmp_path: Path, field: str, value: str, *, adopted: bool = False) -> Path:
    """A corpus whose manifest names a file outside its folder, of the right size."""
    write_corpus(tmp_path / "c")
    (tmp_path / "secret").write_bytes(
        (tmp_path / "c" / ("train.bin" if field == "file" else "train.ends")).read_bytes()
    )
    document = json.loads((tmp_path / "c" / FILE_NAME).read_text())
    document["splits"]["train"][field] = value
    if adopted:
        document["splits"]["train"]["adopted"] = True
    (tmp_path / "c" / FILE_NAME).write_text(json.dumps(document))
    return tmp_path / "c"


@pytest.mark.parametrize("field", ["file", "ends"])
@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, field: str, kind: str) -> None:
    value = {"parent": "../secret", "absolute": str(tmp_path / "secret"), "link": "link"}[kind]
    directory = elsewhere(tmp_path, field, value)
    (directory / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ManifestError, match=rf"{value}.* is outside .*--adopt FILE"):
        Manifest.read(directory)


def test_an_adopted_file_may_lie_elsewhere_and_its_ends_may_not(tmp_path: Path) -> None:
    assert Manifest.read(elsewhere(tmp_path / "a", "file", "../secret", adopted=True)).splits["train"].adopted
    with pytest.raises(ManifestError, match="is outside"):
        Manifest.read(elsewhere(tmp_path / "b", "ends", "../secret", adopted=True))


HOSTILE = {
    "deep": b'{"format": ' + b"[" * 100_000,
    "digits": b'{"format": "phi_fast tokens", "version": ' + b"1" * 10_000 + b"}",
    "not UTF-8": b'{"format": "\xff"}',
    "NaN": b'{"format": NaN}',
    "a block without end": b"block_bytes",
    "an odd block": b"odd",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_json(tmp_path: Path, kind: str) -> None:
    write_corpus(tmp_path)
    data = HOSTILE[kind]
    if kind.endswith(("end", "odd block")):
        size = 2**62 if kind.endswith("end") else 65
        data = (tmp_path / FILE_NAME).read_bytes().replace(b'"block_bytes": 64', b'"block_bytes": %d' % size)
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in (FILE_NAME, "train.ends", "train.bin"):
        write_corpus(tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(ManifestError, match=name):
            Manifest.read(tmp_path)
        (tmp_path / name).unlink()


def test_every_flipped_bit_is_an_error_or_harmless(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path)
    whole, refused = (tmp_path / FILE_NAME).read_bytes(), 0
    for at in range(0, 8 * len(whole), 5):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        (tmp_path / FILE_NAME).write_bytes(flipped)
        try:
            found = Manifest.read(tmp_path)
        except ManifestError:
            refused += 1
        else:
            assert found.splits.keys() <= {*manifest.splits, *found.splits}
            for split in found.splits.values():
                assert (tmp_path / split.file).stat().st_size == split.tokens * 2
    assert refused > 4 * len(whole) / 5

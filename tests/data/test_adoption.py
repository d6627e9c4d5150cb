from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi_fast.data import sequential_rows, stdlib_corpus, vocabulary
from phi_fast.data.manifest import Delimiter, Manifest, ManifestError
from phi_fast.prepare import main

TEXTS = ["one two three", "vier", "fünf sechs " * 30, "7"]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    stdlib_corpus.train_tokenizer(TEXTS).save(str(path))
    return path


@pytest.fixture(scope="module")
def encoded(tokenizer_path: Path) -> list[list[int]]:
    """Token ids of each text, without delimiters."""
    return [encoding.ids for encoding in vocabulary.tokenizer(tokenizer_path).encode_batch(TEXTS)]


def closed(documents: list[list[int]]) -> list[int]:
    return [id for document in documents for id in [*document, 0]]


def opened(documents: list[list[int]]) -> list[int]:
    return [id for document in documents for id in [0, *document]]


def lengths(documents: list[list[int]]) -> list[int]:
    return [len(document) + 1 for document in documents]


def write_raw(path: Path, documents: list[list[int]]) -> None:
    np.array(closed(documents), "<u2").tofile(path)


def write_llmc(path: Path, documents: list[list[int]]) -> None:
    tokens = np.array(opened(documents), "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def write_llmc_wide(path: Path, documents: list[list[int]]) -> None:
    tokens = np.array(opened(documents), "<u4")
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def write_megatron(path: Path, documents: list[list[int]]) -> None:
    """Each document has two sequences; the second one is empty except in the third document."""
    np.array(closed(documents), "<i4").tofile(path)
    sizes = np.array([part for size in lengths(documents) for part in (size, 0)], "<i4")
    sizes[4:6] = 5, lengths(documents)[2] - 5
    pointers = (np.cumsum(sizes) - sizes).astype("<i8") * 4
    first = np.arange(0, len(sizes) + 1, 2, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(sizes), len(first))
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + first.tobytes())


def write_datatrove(path: Path, documents: list[list[int]]) -> None:
    np.array(closed(documents), "<u2").tofile(path)
    np.cumsum(lengths(documents)).astype("<u8").tofile(path.with_name(path.name + ".index"))


def write_npy(path: Path, documents: list[list[int]]) -> None:
    np.save(path, np.array(closed(documents), "<u4"))


CASES: dict[str, tuple[str, Callable[[Path, list[list[int]]], None], str, str]] = {
    "raw": ("train.bin", write_raw, "uint16", "after"),
    "llm.c": ("train.bin", write_llmc, "uint16", "before"),
    "llm.c wide": ("train.bin", write_llmc_wide, "uint32", "before"),
    "megatron": ("text_document.bin", write_megatron, "uint32", "after"),
    "datatrove": ("00000.ds", write_datatrove, "uint16", "after"),
    "npy": ("part.npy", write_npy, "uint32", "after"),
    "headerless npy": ("part-0.npy", write_raw, "uint16", "after"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format(tmp_path: Path, tokenizer_path: Path, encoded: list[list[int]], case: str) -> None:
    name, write, dtype, side = CASES[case]
    source = tmp_path / "elsewhere" / name
    source.parent.mkdir()
    write(source, encoded)
    before = source.read_bytes()
    width = ["--dtype", dtype] if write is write_raw else []
    out = tmp_path / "new" / "out"
    assert main(["--adopt", str(source), "--tokenizer", str(tokenizer_path), "--out", str(out), *width]) == 0

    manifest = Manifest.read(out)
    manifest.verify(out)
    assert (manifest.dtype, manifest.delimiter) == (dtype, Delimiter(0, side))  # type: ignore[arg-type]
    split = manifest.splits["train"]
    assert (out / split.file).samefile(source)
    assert source.read_bytes() == before
    assert sum(path.stat().st_size for path in out.glob("*.bin")) == 0
    assert np.fromfile(out / split.ends, "<u8").tolist() == np.cumsum(lengths(encoded)).tolist()
    assert split.max_id == max(map(max, encoded))
    tokens = np.fromfile(out / split.file, manifest.numpy_dtype, offset=split.offset)
    assert tokens.tolist() == (closed if side == "after" else opened)(encoded)
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "new"}
    assert list(out.parent.iterdir()) == [out]


def test_two_files_are_two_splits(tmp_path: Path, tokenizer_path: Path, encoded: list[list[int]]) -> None:
    write_raw(tmp_path / "train.bin", encoded)
    write_raw(tmp_path / "val.bin", encoded[1:3])
    files = [str(tmp_path / "train.bin"), str(tmp_path / "val.bin")]
    out = tmp_path / "corpus"
    assert main(["--tokenizer", str(tokenizer_path), "--dtype", "uint16", "--out", str(out), "--adopt", *files]) == 0
    splits = Manifest.read(out).splits
    assert [(name, split.documents) for name, split in splits.items()] == [("train", 4), ("validation", 2)]


def test_the_loader_reads_an_adopted_file(tmp_path: Path, tokenizer_path: Path, encoded: list[list[int]]) -> None:
    write_llmc(tmp_path / "a.bin", encoded)
    out = tmp_path / "out"
    assert main(["--adopt", str(tmp_path / "a.bin"), "--tokenizer", str(tokenizer_path), "--out", str(out)]) == 0
    tokens = opened(encoded)
    rows = [ids[0].tolist() for ids, _ in sequential_rows(out, "train", 8)]
    assert rows == [tokens[at : at + 8] for at in range(0, len(tokens) - 8, 8)]


def test_the_last_document_may_be_cut(tmp_path: Path, tokenizer_path: Path, encoded: list[list[int]]) -> None:
    ids = closed(encoded)[:-1]
    np.array(ids, "<u2").tofile(tmp_path / "a.bin")
    out = tmp_path / "out"
    arguments = ["--adopt", str(tmp_path / "a.bin"), "--tokenizer", str(tokenizer_path), "--dtype", "uint16"]
    assert main([*arguments, "--out", str(out)]) == 0
    manifest = Manifest.read(out)
    assert manifest.delimiter == Delimiter(0)
    assert np.fromfile(out / "train.ends", "<u8").tolist()[-1] == len(ids)
    assert manifest.splits["train"].documents == 4


def test_a_file_without_the_delimiter_is_one_document(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.array([5, 6, 7], "<u2").tofile(tmp_path / "a.bin")
    arguments = ["--adopt", str(tmp_path / "a.bin"), "--tokenizer", str(tokenizer_path), "--dtype", "uint16"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "a.bin is one document: it does not contain id 0" in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.delimiter, manifest.splits["train"].documents) == (None, 1)


def test_a_file_that_changes_afterwards_is_noticed(
    tmp_path: Path, tokenizer_path: Path, encoded: list[list[int]]
) -> None:
    write_datatrove(tmp_path / "a.ds", encoded)
    assert (
        main(["--adopt", str(tmp_path / "a.ds"), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "o")]) == 0
    )
    (tmp_path / "a.ds").write_bytes((tmp_path / "a.ds").read_bytes()[:-2])
    with pytest.raises(ManifestError, match=r"a\.ds has \d+ bytes, and .* take \d+: the file was cut short"):
        Manifest.read(tmp_path / "o")


def spoil_datatrove(path: Path, documents: list[list[int]]) -> None:
    write_datatrove(path, documents)
    index = path.with_name(path.name + ".index")
    ends = np.fromfile(index, "<u8")
    ends[[1, 2]] = ends[[2, 1]]
    ends.tofile(index)


def spoil_megatron(path: Path, documents: list[list[int]]) -> None:
    write_megatron(path, documents)
    data = bytearray(path.with_suffix(".idx").read_bytes())
    data[-16:-8] = struct.pack("<q", 99)
    path.with_suffix(".idx").write_bytes(data)


def write_large_ids(path: Path, documents: list[list[int]]) -> None:
    np.array([1, 60000, 0], "<u2").tofile(path)


@pytest.mark.parametrize(
    ("name", "write", "options", "message"),
    [
        ("a.bin", write_raw, [], "a.bin has no header that records its dtype: give dtype='uint16'"),
        ("a.bin", write_large_ids, ["--dtype", "uint16"], "a.bin has id 60000, and the tokenizer has"),
        ("a.ds", spoil_datatrove, [], "a.ds.index: its documents do not ascend"),
        ("a.bin", spoil_megatron, [], "a.idx: a document begins at a sequence that is not among its 8"),
        ("a.npy", write_npy, ["--dtype", "uint16"], "has uint32 tokens, asked for dtype='uint16'"),
    ],
)
def test_what_a_fault_says(
    tmp_path: Path,
    tokenizer_path: Path,
    encoded: list[list[int]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    write: Callable[[Path, list[list[int]]], None],
    options: list[str],
    message: str,
) -> None:
    write(tmp_path / name, encoded)
    before = {path.name for path in tmp_path.iterdir()}
    arguments = ["--adopt", str(tmp_path / name), "--tokenizer", str(tokenizer_path), *options]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_three_files_are_too_many(tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokenizer", str(tokenizer_path), "--out", "o", "--adopt", "a", "b", "c"]) == 1
    assert "3 were named" in capsys.readouterr().err


def test_onto_a_link_to_nothing(tmp_path: Path, tokenizer_path: Path, encoded: list[list[int]]) -> None:
    """It used to fail at its end, when the finished corpus replaced the link."""
    write_datatrove(tmp_path / "a.ds", encoded)
    (tmp_path / "out").symlink_to("big/corpus")
    arguments = ["--adopt", str(tmp_path / "a.ds"), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert Manifest.read(tmp_path / "big" / "corpus").splits["train"].adopted
    Manifest.read(tmp_path / "out").verify(tmp_path / "out")

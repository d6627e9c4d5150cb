"""Reads every format, from files laid out as the format's own program writes them."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from token_files import DELIMITER, draw_tokens, llmc, megatron_index, write_corpus

from phi_fast.data import Component, FormatError, Mixture, TokenLoader, sequential_rows
from phi_fast.data.formats import open_layout
from phi_fast.data.manifest import ManifestError

IDS = draw_tokens(3001, seed=4)
WIDTH = {"uint16": "<u2", "uint32": "<u4"}


def write(tmp_path, name, dtype):
    """The path to open, and the dtype that must be given, or None."""
    raw = IDS.astype(WIDTH[dtype])
    if name == "phi_fast":
        return write_corpus(tmp_path / "ours", IDS, dtype), None
    if name == "llm.c":
        (tmp_path / "llmc.bin").write_bytes(llmc(IDS, dtype))
        return tmp_path / "llmc.bin", None
    if name == "megatron":
        raw.tofile(tmp_path / "text_document.bin")
        (tmp_path / "text_document.idx").write_bytes(megatron_index([1000, 1, 1500, 500], dtype))
        return tmp_path / "text_document", None
    if name == "datatrove":
        raw.tofile(tmp_path / "0.ds")
        np.array([10, 500, 3001], "<u8").tofile(tmp_path / "0.ds.index")
        return tmp_path / "0.ds", None
    if name == "npy":
        np.save(tmp_path / "real.npy", raw)
        return tmp_path / "real.npy", None
    raw.tofile(tmp_path / "part-0.npy")  # OLMo's and nanoGPT's: no header
    return tmp_path / "part-0.npy", dtype


FORMATS = ["phi_fast", "llm.c", "megatron", "datatrove", "npy", "raw"]


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", FORMATS)
def test_reads_the_same_tokens(tmp_path, name, dtype, mode):
    path, said = write(tmp_path, name, dtype)
    layout = open_layout(path, "train", said)
    assert (layout.format, layout.dtype, layout.tokens) == (name, dtype, len(IDS))
    mixture = Mixture((Component("c", path, dtype=said),))
    with TokenLoader(mixture, 64, 8, mode=mode) as loader:
        for _ in range(12):
            batch = next(loader)
            for i, row in enumerate(batch.rows):
                token = loader.store.place(row).token
                assert batch.input_ids[i].tolist() == IDS[token : token + 64].tolist()
                assert batch.labels[i].tolist() == IDS[token + 1 : token + 65].tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_sequential_rows(tmp_path, name):
    path, said = write(tmp_path, name, "uint16")
    rows = list(sequential_rows(path, "train", 100, batch=8, dtype=said))
    assert [len(ids) for ids, _ in rows] == [8, 8, 8, 6]
    assert np.concatenate([ids.flatten() for ids, _ in rows]).tolist() == IDS[:3000].tolist()
    assert np.concatenate([labels.flatten() for _, labels in rows]).tolist() == IDS[1:].tolist()
    part = list(sequential_rows(path, "train", 100, batch=8, start=3, stop=5, dtype=said))
    assert part[0][0].flatten().tolist() == IDS[300:500].tolist()


def test_sequential_rows_says_how_many_there_are(tmp_path):
    path, _ = write(tmp_path, "phi_fast", "uint16")
    with pytest.raises(FormatError, match="has 30 rows of sequence_length=100, asked for rows 0 to 31"):
        next(sequential_rows(path, "train", 100, stop=31))
    with pytest.raises(FormatError, match="has 0 rows of sequence_length=3001"):
        next(sequential_rows(path, "train", 3001))


def test_one_megatron_sequence_and_its_three_names(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "x.bin")
    (tmp_path / "x.idx").write_bytes(megatron_index([len(IDS)], "uint16"))
    layouts = {open_layout(tmp_path / name) for name in ("x", "x.bin", "x.idx")}
    assert len(layouts) == 1


def test_copies_have_one_fingerprint_and_other_content_another(tmp_path):
    for name in FORMATS:
        folders = [tmp_path / name / part for part in "ab"]
        for folder in folders:
            folder.mkdir(parents=True)
        written = [write(folder, name, "uint16") for folder in folders]
        prints = {open_layout(path, "train", said).fingerprint for path, said in written}
        assert len(prints) == 1
        path, said = write(folders[1], name, "uint32")
        assert open_layout(path, "train", said).fingerprint not in prints


def npy(header: str, data: bytes = IDS.astype("<u2").tobytes(), version: int = 1) -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + struct.pack("<BBH", version, 0, len(text)) + text + data


DATA = IDS.astype("<u2").tobytes()
BAD = {
    "empty": ("a.bin", b"", "is empty"),
    "odd size": ("a.bin", DATA[:-1], "not a multiple of uint16's 2"),
    "uint32 read as uint16": ("a.bin", IDS.astype("<u4").tobytes(), "it is dtype='uint32'"),
    "parquet": ("a.bin", b"PAR1" + DATA, "is a Parquet file, not tokens"),
    "gzip": ("a.bin", b"\x1f\x8b" + DATA, "is a gzip file"),
    "llm.c version": ("a.bin", struct.pack("<3i", 20240520, 7, 3001) + DATA, "20240520 with version 7"),
    "llm.c cut short": ("a.bin", llmc(IDS, "uint16")[:-2], "room for 3000: it was cut short"),
    "llm.c too long": ("a.bin", llmc(IDS, "uint16") + b"ab", "not closed properly"),
    "llm.c header cut": ("a.bin", llmc(IDS, "uint16")[:10], "the header is cut short: it has 10 bytes"),
    "llm.c negative": ("a.bin", struct.pack("<3i", 20240520, 1, -1) + DATA, "says -1 tokens"),
    "llm.c no tokens": ("a.bin", llmc(IDS[:0], "uint16"), "says 0 tokens"),
    "npy int64": ("a.npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3001,), }"), "dtype is '<i8'"),
    "npy big-endian": ("a.npy", npy("{'descr': '>u2', 'shape': (3001,), }"), "dtype is '>u2'"),
    "npy 2-d": ("a.npy", npy("{'descr': '<u2', 'shape': (3, 1000), }"), r"shape is \(3, 1000\), expected one"),
    "npy 0-d": ("a.npy", npy("{'descr': '<u2', 'shape': (), }"), r"shape is \(\)"),
    "npy huge": ("a.npy", npy("{'descr': '<u2', 'shape': (99999999999999999999999,), }"), "shape is too large"),
    "npy no shape": ("a.npy", npy("{'descr': '<u2', }"), "no 'shape'"),
    "npy cut short": ("a.npy", npy("{'descr': '<u2', 'shape': (3002,), }"), "room for 3001"),
    "npy version": ("a.npy", npy("{'descr': '<u2', 'shape': (3001,), }", version=9), "NPY version 9"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_says_why(tmp_path, case):
    name, data, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        open_layout(path, "train", "uint16")
    assert str(path) in str(caught.value)


def megatron(tmp_path, index: bytes):
    IDS.astype("<u2").tofile(tmp_path / "m.bin")
    (tmp_path / "m.idx").write_bytes(index)
    return tmp_path / "m.bin"


GOOD = megatron_index([1000, 2001], "uint16")
BAD_INDEX = {
    "version": (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], "version 2, expected 1"),
    "dtype": (GOOD[:17] + b"\x06" + GOOD[18:], "dtype code 6"),
    "no sequences": (GOOD[:18] + struct.pack("<QQ", 0, 1) + GOOD[34:], "no documents"),
    "too many": (GOOD[:18] + struct.pack("<QQ", 2**62, 3) + GOOD[34:], "cut short"),
    "cut": (GOOD[:-1], "cut short"),
    "header only": (GOOD[:20], "header is cut short"),
    "gap": (
        megatron_index([1000, 2001], "uint32")[:17] + b"\x08" + megatron_index([1000, 2001], "uint32")[18:],
        "byte",
    ),
    "bin cut short": (
        megatron_index([1000, 2002], "uint16"),
        "says 3002 tokens of 2 bytes, the file has room for 3001",
    ),
    "bin too long": (megatron_index([1000, 2000], "uint16"), "not closed properly"),
    "negative length": (megatron_index([1000, -1], "uint16"), "-1 tokens"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_megatron_indices_that_cannot_be_read(tmp_path, case):
    index, message = BAD_INDEX[case]
    with pytest.raises(FormatError, match=message):
        open_layout(megatron(tmp_path, index))


@pytest.mark.parametrize(
    ("ends", "message"),
    [([], "it is empty"), ([10, 3000], "neither 2 nor 4 a token"), ([4000, 3001], "does not ascend")],
)
def test_datatrove_indices_that_cannot_be_read(tmp_path, ends, message):
    IDS.astype("<u2").tofile(tmp_path / "0.ds")
    np.array(ends, "<u8").tofile(tmp_path / "0.ds.index")
    with pytest.raises(FormatError, match=message):
        open_layout(tmp_path / "0.ds")


def test_dtypes_are_asked_for_and_checked(tmp_path):
    path, _ = write(tmp_path, "raw", "uint16")
    with pytest.raises(FormatError, match="give dtype='uint16' or 'uint32'"):
        open_layout(path)
    with pytest.raises(FormatError, match=r"dtype='int8' for .*: must be one of 'uint16', 'uint32'"):
        open_layout(path, "train", "int8")
    with pytest.raises(FormatError, match=r"starts with id .* if read as uint32"):
        IDS[:3000].astype("<u2").tofile(path)
        open_layout(path, "train", "uint32")
    ours, _ = write(tmp_path, "phi_fast", "uint16")
    with pytest.raises(FormatError, match="has uint16 tokens, asked for dtype='uint32'"):
        open_layout(ours, "train", "uint32")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FormatError, match="nothing does not exist; expected a corpus directory"):
        open_layout(tmp_path / "nothing")
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist"):
        open_layout(tmp_path)
    with pytest.raises(ManifestError, match="split 'validation' is not in this corpus"):
        open_layout(write_corpus(tmp_path / "c", IDS), "validation")


def test_delimiters_of_foreign_files_are_asked_for(tmp_path):
    path, said = write(tmp_path, "raw", "uint16")
    mixture = Mixture((Component("c", path, dtype=said),))
    with pytest.raises(FormatError, match="does not record which id is between its documents"):
        TokenLoader(mixture, 64, 2, document_isolation=True)
    mixture = Mixture((Component("c", path, dtype=said, delimiter=DELIMITER),))
    with TokenLoader(mixture, 3000, 1, document_isolation=True) as loader:
        batch = next(loader)
        assert len(batch.cu_seqlens) > 18


def litdata_chunk(items):
    """As litdata's BinaryWriter writes it: u32 number of items, u32 offsets of the items and of the end, the items."""
    sizes = np.cumsum([0, *map(len, items)]) + 4 * (len(items) + 2)
    return np.array([len(items), *sizes], "<u4").tobytes() + b"".join(items)


def llmc_evaluation():
    """llm.c's HellaSwag file: magic 20240522, version 1, examples, longest example, then uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:4] = 20240522, 1, 3, 40
    return header.tobytes() + np.arange(1, 101, dtype="<u2").tobytes()


OTHERS = {
    "litdata": (litdata_chunk([np.arange(1, 311, dtype="<u4").tobytes()] * 20), "a chunk of litdata"),
    "litdata, many": (litdata_chunk([bytes([1, 0, 0, 0])] * 30_000), "a chunk of litdata"),
    "llm.c evaluation": (llmc_evaluation(), "llm.c's evaluation file"),
    "llm.c weights": (np.array([20240326, 3, 7, 7], "<i4").tobytes() * 64, "a checkpoint of llm.c's GPT-2"),
    "bzip2": (b"BZh91AY&SY" + bytes(range(90)), "a bzip2 file"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\0" + bytes(249), "a tar archive"),
    "pdf": (b"%PDF-1.7" * 9, "a PDF"),
}


@pytest.mark.parametrize("dtype", [None, "uint16", "uint32"])
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_others_are_refused_by_name(tmp_path, name, dtype):
    data, what = OTHERS[name]
    (tmp_path / "chunk-0-0.bin").write_bytes(data)
    with pytest.raises(FormatError, match=rf"chunk-0-0\.bin is {what}.*, not tokens"):
        open_layout(tmp_path / "chunk-0-0.bin", dtype=dtype)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bare_tokens_are_not_taken_for_files_of_others(tmp_path, dtype):
    """Ids that begin like a litdata chunk of 20 samples, but whose 21st is not the file's end, or like a pickle."""
    for first in ([20, 88, 5], [640, 5, 6]):
        ids = np.array([*first, *range(7, 300)], WIDTH[dtype])
        ids.tofile(tmp_path / "t.bin")
        assert open_layout(tmp_path / "t.bin", dtype=dtype).tokens == len(ids)


def test_a_pipe_beside_a_token_file_is_not_waited_for(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "t.bin")
    os.mkfifo(tmp_path / "t.idx")
    with pytest.raises(ValueError, match=r"t\.idx is not a regular file"):
        open_layout(tmp_path / "t.bin", dtype="uint16")

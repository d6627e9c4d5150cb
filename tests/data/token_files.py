"""Small token files for the tests, in every format."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from phi_fast.data.manifest import Delimiter, Manifest, Split

DELIMITER = 50256


def draw_tokens(count: int, seed: int = 0, documents: int = 20, top: int = 50000) -> np.ndarray:
    """Random ids below `top`, including the last, with a delimiter after each of about `documents` documents."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, top, count)
    ids[generator.choice(count - 1, documents - 1, replace=False)] = DELIMITER
    ids[-1] = DELIMITER
    return ids


def write_corpus(directory: Path, ids: np.ndarray, dtype: str = "uint16", split: str = "train") -> Path:
    """A corpus directory with one split, as `prepare` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    data = ids.astype(f"<u{np.dtype(dtype).itemsize}").tobytes()
    ends = (np.flatnonzero(ids == DELIMITER) + 1).astype("<u8")
    if not len(ends) or ends[-1] != len(ids):
        ends = np.append(ends, len(ids)).astype("<u8")
    (directory / f"{split}.bin").write_bytes(data)
    (directory / f"{split}.ends").write_bytes(ends.tobytes())
    part = Split(
        file=f"{split}.bin",
        ends=f"{split}.ends",
        tokens=len(ids),
        documents=len(ends),
        max_id=int(ids.max()),
        sha256=tuple(hashlib.sha256(data[i : i + 2**24]).hexdigest() for i in range(0, len(data), 2**24)),
    )
    vocab_size = max(50295, int(ids.max()) + 1)
    Manifest(dtype, "phi-1.5", "0" * 64, vocab_size, Delimiter(DELIMITER), {split: part}).write(directory)
    return directory


def write_marked(directory: Path, ids: np.ndarray, marks: np.ndarray, row_tokens: int, dtype: str = "uint16") -> Path:
    """A corpus directory with a train split of packed rows, as `prepare --chat` writes it."""
    write_corpus(directory, ids, dtype)
    manifest = Manifest.read(directory)
    (directory / "train.marks").write_bytes(marks.astype("u1").tobytes())
    split = replace(
        manifest.splits["train"],
        marks="train.marks",
        marks_sha256=(hashlib.sha256(marks.astype("u1").tobytes()).hexdigest(),),
        row_tokens=row_tokens,
    )
    replace(manifest, splits={"train": split}).write(directory)
    return directory


def llmc(ids: np.ndarray, dtype: str) -> bytes:
    """llm.c's header of 256 int32, and the tokens."""
    magic, version = (20240520, 1) if dtype == "uint16" else (20240801, 7)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.astype(f"<u{np.dtype(dtype).itemsize}").tobytes()


def megatron_index(lengths: list[int], dtype: str) -> bytes:
    """Megatron's .idx for sequences of these lengths, each of which is a document."""
    width, code = (2, 8) if dtype == "uint16" else (4, 4)
    count = len(lengths)
    pointers = np.cumsum([0, *lengths[:-1]], dtype="<i8") * width
    return b"".join(
        [
            b"MMIDIDX\0\0",
            struct.pack("<QBQQ", 1, code, count, count + 1),
            np.array(lengths, "<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.arange(count + 1, dtype="<i8").tobytes(),
        ]
    )

"""Damaged headers of every format: each is refused with a reason, or describes tokens that the file can hold."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from model_folders import make_source, random_weights
from test_fuzz_headers import EXTREMES
from token_files import draw_tokens, llmc, megatron_index, write_corpus

from phi_fast.conversion.source import Source
from phi_fast.data.formats import open_layout
from phi_fast.errors import UsageError

from .tally import Tally

IDS = draw_tokens(60, documents=3)
IN_MEMORY = Path("/dev/shm")
"""Folder for files that are rewritten a million times. On a disk, ext4 would write each truncated file out first."""
MODELS_PART = 0.03
"""Share of the attacks on a model's files, each of which takes some milliseconds."""
WORDS = [b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1e999", b"0.5", b"NaN", b"9" * 30, b'"\\ud800"', b"[" * 2000]


def damaged(choose: random.Random, good: bytes) -> bytes:
    """A valid header with some bytes, 8-byte fields or words changed, and perhaps its end cut off."""
    data = bytearray(good)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(data))
        kind = choose.randrange(4)
        if kind == 0:
            data[at] = choose.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << choose.randrange(8)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", choose.choice(EXTREMES))[: len(data[at : at + 8])]
        else:
            data[at : at + choose.randrange(12)] = choose.choice(WORDS)
    return bytes(data[: choose.randrange(len(data)) if choose.random() < 0.1 else len(data)])


def token_files(folder: Path) -> list[tuple[Path, Path]]:
    """Valid files of each format: the path to open, and the file with the header."""
    folder.mkdir()
    tokens = IDS.astype("<u2").tobytes()
    (folder / "llmc.bin").write_bytes(llmc(IDS, "uint16"))
    array = BytesIO()
    np.save(array, IDS.astype("<u2"))
    (folder / "array.npy").write_bytes(array.getvalue())
    (folder / "megatron.bin").write_bytes(tokens)
    (folder / "megatron.idx").write_bytes(megatron_index([20, 0, 30, 10], "uint16"))
    (folder / "datatrove.ds").write_bytes(tokens)
    (folder / "datatrove.ds.index").write_bytes(np.array([20, 60], "<u8").tobytes())
    (folder / "raw.bin").write_bytes(tokens)
    write_corpus(folder / "ours", IDS)
    alone = [(folder / name, folder / name) for name in ("llmc.bin", "array.npy", "raw.bin")]
    return [
        *alone,
        (folder / "megatron.bin", folder / "megatron.idx"),
        (folder / "datatrove.ds", folder / "datatrove.ds.index"),
        (folder / "ours", next((folder / "ours").glob("*.json"))),
    ]


def open_tokens(path: Path, choose: random.Random) -> None:
    layout = open_layout(path, dtype=choose.choice([None, "uint16", "uint32"]))
    assert layout.tokens > 0 and layout.width in (2, 4), layout
    if layout.format != "phi_fast":  # its tokens are compared with the manifest when they are mapped
        assert layout.offset + layout.bytes <= layout.path.stat().st_size, layout


def open_model(path: Path, choose: random.Random) -> None:
    source = Source.open(path)
    assert source.parts


Opens = Callable[[Path, random.Random], None]


def attack(tally: Tally, seed: int) -> None:
    choose = random.Random(seed)
    place = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="phi-fast-attack-", dir=place) as name:
        model = make_source(Path(name) / "model", "hf", random_weights())
        tokens: list[tuple[Opens, Path, Path]] = [(open_tokens, *pair) for pair in token_files(Path(name) / "tokens")]
        models: list[tuple[Opens, Path, Path]] = [
            (open_model, model, model / file) for file in ("config.json", "model.safetensors")
        ]
        good = {header: header.read_bytes() for _, _, header in (*tokens, *models)}
        while tally.more():
            opens, path, header = choose.choice(models if choose.random() < MODELS_PART else tokens)
            whole = good[header]
            end = header_end(header, whole)
            data = damaged(choose, whole[:end])
            header.write_bytes(data + whole[end:])
            try:
                opens(path, choose)
            except (UsageError, OSError) as error:
                if not str(error):
                    tally.failed(f"{header.name} {data[:1000].hex()}: {type(error).__name__} without a message")
            except BaseException as error:
                tally.raised(f"{header.name} {data[:1000].hex()}", error)
                if isinstance(error, KeyboardInterrupt):
                    raise
            header.write_bytes(whole)
            tally.did()


def header_end(path: Path, whole: bytes) -> int:
    """Length of the header in bytes, or of the entire file if it is only a header."""
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(whole[:8], "little")
    return {"llmc.bin": 1024, "array.npy": 128, "raw.bin": 64}.get(path.name, len(whole))

"""A file that is cut short while it is read gives an error that names it, never a SIGBUS that ends the process."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from token_files import draw_tokens, megatron_index, write_corpus

import phi_fast
from phi_fast._C import tokens
from phi_fast.data import vocabulary
from phi_fast.data.manifest import Manifest
from phi_fast.data.plain_reads import CutShortError
from phi_fast.data.preparation import adoption, merge, units
from phi_fast.prepare import main

COUNT = 400_000


def write_raw(folder: Path) -> list[str]:
    np.full(COUNT, 5, "<u2").tofile(folder / "a.bin")
    return [str(folder / "a.bin"), "--dtype", "uint16"]


def write_datatrove(folder: Path) -> list[str]:
    np.full(COUNT, 5, "<u2").tofile(folder / "a.ds")
    np.arange(1, COUNT + 1, dtype="<u8").tofile(folder / "a.ds.index")
    return [str(folder / "a.ds")]


def write_megatron(folder: Path) -> list[str]:
    np.full(COUNT, 5, "<u2").tofile(folder / "a.bin")
    (folder / "a.idx").write_bytes(megatron_index([1] * COUNT, "uint16"))
    return [str(folder / "a.bin")]


@pytest.mark.parametrize(
    ("write", "shrinks"),
    [(write_raw, "a.bin"), (write_datatrove, "a.ds.index"), (write_datatrove, "a.ds"), (write_megatron, "a.idx")],
)
@pytest.mark.parametrize("left", [0, 5000])
def test_adopting_a_file_that_shrinks(
    tmp_path: Path,
    small_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], list[str]],
    shrinks: str,
    left: int,
) -> None:
    arguments = write(tmp_path)
    opened = adoption.open_layout

    def then_cut(*given: object, **named: object) -> object:
        layout = opened(*given, **named)  # type: ignore[arg-type]
        os.truncate(tmp_path / shrinks, left)
        return layout

    monkeypatch.setattr(adoption, "open_layout", then_cut)
    assert main(["--adopt", *arguments, "--tokenizer", str(small_tokenizer), "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert re.search(rf"{re.escape(shrinks)}.*([cC]opy|ascend)", errors), errors
    assert not (tmp_path / "out").exists()


def test_adopting_a_file_that_shrinks_while_its_tokens_are_read(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write_raw(tmp_path)
    advance = adoption.Meter.advance

    def then_cut(meter: adoption.Meter, *given: int) -> None:
        advance(meter, *given)
        os.truncate(tmp_path / "a.bin", 5000)

    monkeypatch.setattr(adoption, "BLOCK_BYTES", 100_000)
    monkeypatch.setattr(adoption.Meter, "advance", then_cut)
    assert main(["--adopt", *arguments, "--tokenizer", str(small_tokenizer), "--out", str(tmp_path / "out")]) == 1
    assert "a.bin ends at byte 100000, expected 50000 uint16 from byte 100000 on" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["train.bin", "train.ends"])
def test_verifying_a_file_that_shrinks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write_corpus(tmp_path / "c", draw_tokens(50_000, documents=20_000))
    validate = Manifest.validate

    def then_cut(manifest: Manifest, directory: Path) -> None:
        validate(manifest, directory)
        if (directory / file).stat().st_size > 16:
            os.truncate(directory / file, 16)

    monkeypatch.setattr(Manifest, "validate", then_cut)
    manifest = Manifest.read(tmp_path / "c")
    assert main(["--inspect", str(tmp_path / "c")]) == 1
    assert re.search(rf"{file} .*cut short", capsys.readouterr().err)
    assert manifest.splits["train"].tokens == 50_000


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_parsing_a_mapped_index_that_shrinks(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "index"
    data = (
        megatron_index([1] * COUNT, "uint16") if kind == "megatron" else np.arange(1, COUNT + 1, dtype="<u8").tobytes()
    )
    path.write_bytes(data)
    parse = tokens.parse_megatron if kind == "megatron" else tokens.parse_datatrove
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as index:
        assert parse(index, 2 * COUNT)[2] == COUNT
        for left in (len(data) // 2, 4096, 0):
            os.truncate(path, left)
            with pytest.raises(ValueError, match=None if left > 4096 else "it was cut short while it was read: byte"):
                parse(index, 2 * COUNT)  # the rest of the last page reads as zeros


def test_merging_units_that_shrink(tmp_path: Path, small_tokenizer: Path) -> None:
    encoding = units.Encoding(vocabulary.tokenizer(small_tokenizer), 0, np.dtype("<u2"))
    for suffix in (".index", ".tokens"):
        unit = tmp_path / f"unit{suffix[1:]}"
        units.encode_unit(unit, 0, [f"text {i}" for i in range(5000)], encoding)
        os.truncate(unit.with_suffix(suffix), 4096)
        with pytest.raises(CutShortError):
            merge.merge([unit], tmp_path, encoding.dtype)


def test_nothing_else_maps_a_file() -> None:
    """formats.py maps indexes for parsers that guard each access; TokenFile, tested elsewhere, guards its own map. The
    others map files that they made themselves, and that are locked while they are mapped."""
    root = Path(phi_fast.__file__).parent
    maps = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "kernels" not in path.parts
        and re.search(r"np\.memmap|mmap\.mmap|mmap_mode", path.read_text(encoding="utf-8"))
    }
    assert maps <= {"data/formats.py", "curation/near.py", "data/remote/block_index.py", "data/remote/cache.py"}

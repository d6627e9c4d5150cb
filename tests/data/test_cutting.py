"""Streams are cut into tasks: each byte is searched once, and no document is split."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi_fast.data.preparation import streams, tasks
from phi_fast.data.preparation.inputs import find_inputs

END = "<|endoftext|>"


@pytest.mark.parametrize("kind", ["_before_last_separator", "_after_last_line"])
def test_text_without_delimiters_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It used to be searched from its start after each read: quadratic, 49 s for 200 MB."""
    name = "a.txt" if kind == "_before_last_separator" else "a.jsonl"
    (tmp_path / name).write_bytes(b"x" * 200_000)
    looked_at = []
    search = getattr(streams, kind)

    def counted(data: bytearray, start: int) -> int:
        looked_at.append(len(data) - start)
        return int(search(data, start))

    monkeypatch.setattr(streams, kind, counted)
    made = list(tasks.cut(find_inputs([tmp_path / name]).read, 1000))
    assert [task.data for task in made] == [b"x" * 200_000]
    assert len(looked_at) == 200
    assert sum(looked_at) <= 200_000 + 200 * len(END)


@pytest.mark.parametrize("unit", [7, 13, 14, 50, 99])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_delimiter_across_two_reads_is_found(tmp_path: Path, name: str, unit: int) -> None:
    documents = ["a" * size for size in (1, 30, 2, 90, 13, 1, 1, 300, 5)]
    between = f"\n{END}\n" if name == "a.txt" else "\n"
    text = between.join(documents)
    (tmp_path / name).write_text(text)
    made = [
        (task.data or (tmp_path / name).read_bytes()) for task in tasks.cut(find_inputs([tmp_path / name]).read, unit)
    ]
    assert b"".join(made).decode() == text
    parts = [part for data in made for part in data.decode().split(between.strip() or "\n")]
    assert [part.strip() for part in parts if part.strip()] == documents
    assert len(made) > 1

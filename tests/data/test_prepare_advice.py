"""Following the advice in an error of `prepare` works, and resumes the work done before."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation import pipeline, streams
from phi_fast.prepare import main

TEXTS = [f"{i} {'lorem ipsum dolor ' * 4}" for i in range(200)]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 2000)
    monkeypatch.setattr(pipeline, "MAX_UNIT_BYTES", 2000)


def lines(texts: list[str], bad: int | None = None, line: str = "{") -> str:
    made = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    if bad is not None:
        made[bad] = line
    return "\n".join(made) + "\n"


def correct(source: Path, arguments: list[str]) -> list[str]:
    source.write_text(lines(TEXTS))
    return arguments


def skip(source: Path, arguments: list[str]) -> list[str]:
    return [*arguments, "--skip-malformed"]


def name_the_field(source: Path, arguments: list[str]) -> list[str]:
    source.write_text(source.read_text().replace('"text"', '"body"'))
    return [*arguments, "--text-field", "body"]


def remove_partial(source: Path, arguments: list[str]) -> list[str]:
    """Cause the next error first, with another seed, and then follow its advice."""
    assert main([*arguments, "--seed", "3"]) == 1
    subprocess.run(["rm", "-r", str(source.parent / "out.partial")], check=True)
    source.write_text(lines(TEXTS))
    return [*arguments, "--seed", "3"]


def lower_the_share(source: Path, arguments: list[str]) -> list[str]:
    source.write_text(lines(TEXTS))
    assert main([*arguments, "--validation", "0.9999999999999999"]) == 1
    return [*arguments, "--validation", "0.1"]


@pytest.mark.parametrize(
    ("follow", "documents"),
    [(correct, 200), (skip, 199), (name_the_field, 199), (remove_partial, 200), (lower_the_share, 200)],
)
def test_advice_on_a_malformed_record_works(
    tmp_path: Path,
    small_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    follow: Callable[[Path, list[str]], list[str]],
    documents: int,
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(lines(TEXTS, bad=150))
    arguments = [str(source), "--tokenizer", str(small_tokenizer), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 1
    assert re.search(r"a\.jsonl, line 151: .*Correct the file, or .* --skip-malformed", capsys.readouterr().err)
    if follow is name_the_field:
        source.write_text(source.read_text().replace("{\n", ""))
    again = follow(source, arguments)
    assert main(again) == 0, capsys.readouterr().err
    splits = Manifest.read(tmp_path / "out").splits.values()
    assert sum(split.documents for split in splits) == documents
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("follow", [correct, skip])
def test_following_advice_keeps_the_work_and_gives_what_a_fresh_run_gives(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str], follow: Callable[..., list[str]]
) -> None:
    source, tokenizer = tmp_path / "a.jsonl", ["--tokenizer", str(small_tokenizer), "--workers", "1"]
    source.write_text(lines(TEXTS, bad=199, line="[" + "1" * 80 + "]"))
    arguments = [str(source), *tokenizer, "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    done = {path: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.index")}
    assert len(done) > 3
    capsys.readouterr()
    again = follow(source, arguments)
    assert main(again) == 0
    kept = re.search(r"kept (\d+) of (\d+) parts", capsys.readouterr().out)
    assert kept and int(kept[1]) == len(done)
    assert (
        main([*again[: -2 if follow is correct else -3], "--out", str(tmp_path / "fresh"), *again[len(arguments) :]])
        == 0
    )
    for name in ("train.bin", "train.ends", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_unit_that_left_records_out_is_made_again_where_they_are_errors(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(lines(TEXTS, bad=0))
    arguments = [str(source), "--tokenizer", str(small_tokenizer), "--out", str(tmp_path / "out"), "--workers", "1"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "merge", full)
        assert main([*arguments, "--skip-malformed"]) == 1
    assert main(arguments) == 1
    assert "a.jsonl, line 1: " in capsys.readouterr().err
    assert main([*arguments, "--skip-malformed"]) == 0
    assert "left out 1 malformed records" in capsys.readouterr().out  # counts records of earlier runs


def test_a_small_corpus_is_told_the_share_that_has_a_validation_document(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(lines(TEXTS[:20]))
    arguments = [str(source), "--tokenizer", str(small_tokenizer), "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--validation", "0.0001"]) == 0
    advice = re.search(r"with --validation (\S+) or more; without, train with --val-every 0", capsys.readouterr().out)
    assert advice
    assert main([*arguments, "--out", str(tmp_path / "again"), "--validation", advice[1]]) == 0
    splits = Manifest.read(tmp_path / "again").splits
    assert (splits["train"].documents, splits["validation"].documents) == (19, 1)


def test_a_damaged_plan_says_what_to_remove(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, partial = tmp_path / "a.jsonl", tmp_path / "out.partial"
    source.write_text(lines(TEXTS))
    arguments = [str(source), "--tokenizer", str(small_tokenizer), "--out", str(tmp_path / "out"), "--workers", "1"]
    partial.mkdir()
    for damage in (b"", b"\xff", b"[" * 10**6, b"[]"):
        (partial / "plan.json").write_bytes(damage)
        assert main(arguments) == 1
        assert f"Remove {partial} to begin anew" in capsys.readouterr().err
    (partial / "plan.json").unlink()
    os.mkfifo(partial / "plan.json")
    assert main(arguments) == 1
    assert "is a FIFO" in capsys.readouterr().err
    subprocess.run(["rm", "-r", str(partial)], check=True)
    assert main(arguments) == 0


def write_parquet(folder: Path) -> Path:
    table = pytest.importorskip("pyarrow").table({"body": TEXTS[:20]})
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def write_splits(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS[:20]})}).save_to_disk(folder / "dict")
    return folder / "dict"


def write_file(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def write_folder(folder: Path) -> Path:
    (folder / "in").mkdir()
    return write_file("a.xyz", "text")(folder / "in").parent


def cut_document(source: Path) -> None:
    source.write_text("<|endoftext|>".join(["x" * 700] * 8))


def as_lines(source: Path) -> None:
    """Does the same as `jq -c '.[]'`."""
    source.with_suffix(".jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in json.loads(source.read_text()))
    )
    source.unlink()


ADVICE: dict[str, tuple[Callable[[Path], Path], list[str], str, list[str], Callable[[Path], None] | None]] = {
    "text field": (write_parquet, [], "but body: name one with --text-field", ["--text-field", "body"], None),
    "splits": (write_splits, [], "name those you want, such as", [], None),
    "suffixes": (write_folder, [], "say which with --suffixes .xyz", ["--suffixes", ".xyz"], None),
    "csv": (write_file("a.csv", "a,b"), [], "read it as text with --suffixes .csv", ["--suffixes", ".csv"], None),
    "json": (write_file("a.json", '[{"text": "a"}]'), [], r"`jq -c '\.\[\]' OLD.json > NEW.jsonl`", [], as_lines),
    "delimiter": (
        *(write_file("a.txt", "text"), ["--delimiter", "</s>"], "or --delimiter None for none"),
        *(["--delimiter", "None"], None),
    ),
    "long document": (write_file("a.txt", "x" * 5000), [], r"Put <\|endoftext\|> between documents", [], cut_document),
}


@pytest.mark.parametrize("name", ADVICE)
def test_other_advice_works(
    tmp_path: Path,
    small_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 2500)
    write, options, message, followed, change = ADVICE[name]
    source = write(tmp_path)
    chosen = [
        "--tokenizer",
        str(small_tokenizer),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--validation",
        "0",
    ]
    assert main([str(source), *chosen, *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    if change is not None:
        change(source)
    source = {"splits": source / "train", "json": source.with_suffix(".jsonl")}.get(name, source)
    assert main([str(source), *chosen, *followed]) == 0, capsys.readouterr().err
    assert Manifest.read(tmp_path / "out").splits["train"].documents >= 1

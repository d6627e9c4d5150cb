"""Malformed, hostile and huge records: each is counted and named, and none is fatal if it is to be skipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_files import files, log, parts, step, text, write_lines

from phi_fast.curation import shards
from phi_fast.curation.documents import CurateError
from phi_fast.curation.exact import ExactDuplicates
from phi_fast.curation.shards import Reading, cut, find
from phi_fast.curation.threshold import Threshold

GOOD = {"text": "a good one"}
MALFORMED: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{nonsense", "not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not JSON: 'utf-8'"),
    "not an object": (b"[1, 2]", "a JSON list"),
    "no text": (b'{"body": "x"}', "no field 'text' among body"),
    "text that is none": (b'{"text": null}', "'text' is NoneType"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate"),
    "half a pair elsewhere": (b'{"text": "x", "note": "\\ud800"}', "surrogate"),
    "NaN": (b'{"text": "x", "scores": {"a": NaN}}', "NaN is no JSON number"),
    "nested too deep": (b'{"text": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests too deep"),
    "scores that are none": (b'{"text": "x", "scores": {"a": "high"}}', "expected a finite number"),
    "an infinite score": (b'{"text": "x", "scores": {"a": 1e999}}', "expected a finite number"),
    "an id that is none": (b'{"text": "x", "id": [1]}', "'id' is list"),
    "a huge number": (b'{"text": "x", "a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "too long": (b'{"text": "' + b"x" * 300_000 + b'"}', "a document of 300,0"),
}


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.replace(" ", "-"))
def test_each_is_named_and_the_rest_is_kept(tmp_path: Path, case: str) -> None:
    line, why = MALFORMED[case]
    source = write_lines(tmp_path / "a.jsonl", [GOOD, line, {"text": "another", "id": 7}])
    with pytest.raises(CurateError, match="--skip-malformed") as error:
        step(Threshold("a", 0), source, tmp_path / "out", max_document_bytes=200_000)
    assert f"{source}:2" in str(error.value) and why in str(error.value)
    assert not (tmp_path / "out").exists()
    report = step(ExactDuplicates(), source, tmp_path / "kept", skip=True, max_document_bytes=200_000)
    assert [one["id"] for one in parts(tmp_path / "kept")] == [f"{source}:1", "7"]
    [named] = log(tmp_path / "kept", "malformed")
    assert named["place"] == f"{source}:2" and why in named["why"]
    assert report.counts.malformed == 1 and report.counts.documents_in == 2


def test_after_an_error_the_same_command_goes_on_with_skip_malformed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*({"text": text(i)} for i in range(100)), b"{", GOOD])
    with pytest.raises(CurateError):
        step(Threshold("a", 0), source, tmp_path / "out")
    finished = sorted((tmp_path / "out.partial" / "work").glob("counts-*"))
    assert finished

    report = step(Threshold("a", 0), source, tmp_path / "out", skip=True)
    assert report.counts.malformed == 1 and report.counts.dropped == {"no score a": 101}


def test_a_line_of_any_length_is_skipped_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 30 MB between two good ones, in a compressed file of 30 kB; never more than two reads are held."""
    monkeypatch.setattr(shards, "_READ", 2**16)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(30):
            file.write(b"y" * 10**6)
        file.write(b'"}\n{"text": "two"}\n')
    import tracemalloc

    entries, reading = find([path]), Reading(skip_malformed=True, max_document_bytes=10**5)
    tracemalloc.start()
    found = list(cut(entries, reading))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 10**6
    assert [place for shard in found for place, _ in shard.refused] == [f"{path}:2"]
    report = step(ExactDuplicates(), path, tmp_path / "out", skip=True, max_document_bytes=10**5)
    assert [one["id"] for one in parts(tmp_path / "out")] == [f"{path}:1", f"{path}:3"]
    assert report.counts.malformed == 1


def test_a_file_cut_short_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress(b"".join(json.dumps({"text": text(i)}).encode() + b"\n" for i in range(200)))[:-3000]
    )
    other = write_lines(tmp_path / "b.jsonl", [GOOD])
    with pytest.raises(CurateError, match=r"a\.jsonl\.gz:\d+: the rest of the file cannot be read"):
        step(ExactDuplicates(), tmp_path, tmp_path / "x" / "out")
    report = step(ExactDuplicates(), tmp_path, tmp_path / "x" / "kept", skip=True)
    kept = parts(tmp_path / "x" / "kept")
    assert 0 < len(kept) - 1 < 200 and kept[-1]["id"] == f"{other}:1"
    assert [one["text"] for one in kept[:-1]] == [text(i) for i in range(len(kept) - 1)]
    [named] = log(tmp_path / "x" / "kept", "malformed")
    assert named["place"] == f"{path}:{len(kept)}" and report.counts.malformed == 1


def test_parquet_keeps_its_columns_and_names_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", b"\xff\xfe", b"three", None]).cast(pa.binary())
    table = pa.table(
        {"content": texts, "id": ["x", "y", "z", "n"], "stars": [1, 2, 3, 4], "raw": [b"a", b"b", b"\xff", b"c"]}
    )
    pq.write_table(table, path, row_group_size=2)
    report = step(ExactDuplicates(), path, tmp_path / "out", skip=True, text_field="content")
    assert parts(tmp_path / "out") == [{"text": "one", "id": "x", "scores": {}, "stars": 1, "raw": "a"}]
    assert [(one["place"], one["why"][:20]) for one in log(tmp_path / "out", "malformed")] == [
        (f"{path}:0.1", "text that is not UTF"),
        (f"{path}:1.1", "'content' is NoneTyp"),
        ("z", "a field that JSON ca"),
    ]
    assert report.counts.malformed == 3
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(CurateError, match="damaged"):
        step(ExactDuplicates(), tmp_path / "b.parquet", tmp_path / "other")


def test_metadata_and_scores_go_through(tmp_path: Path) -> None:
    record = {"text": "é\u2028x", "id": "a", "scores": {"old": 1}, "url": "http://x", "nested": {"a": [1, None]}}
    source = write_lines(tmp_path / "a.jsonl", [record])
    step(ExactDuplicates(), source, tmp_path / "out")
    assert parts(tmp_path / "out") == [record]
    step(Threshold("old", 1), tmp_path / "out", tmp_path / "again")  # the lists beside the documents are not read
    assert parts(tmp_path / "again") == [record]


def test_what_is_no_corpus_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(CurateError, match="plain text; curate reads JSON lines"):
        step(ExactDuplicates(), tmp_path / "a.txt", tmp_path / "out")
    source = write_lines(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(CurateError, match="holds something else"):
        step(ExactDuplicates(), source, tmp_path / "full")
    assert files(tmp_path / "full") == {"mine.txt": b"keep"}

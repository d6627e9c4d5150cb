from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from phi_fast.data import stdlib_corpus, vocabulary
from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation import merge, pipeline, streams, tasks, units
from phi_fast.data.preparation.inputs import PrepareError, find_inputs
from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.data.vocabulary import TokenizerError
from phi_fast.prepare import main

QUIET = Console(quiet=True)
DOCUMENTS = [f"Document {i}, naïve 東京 🙂:\n{'lorem ipsum dolor ' * (i % 7)}\n\tend {i * i}\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a few hundred ids; `<|endoftext|>` is 0."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    stdlib_corpus.train_tokenizer(DOCUMENTS).save(str(path))
    return path


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make units of a few documents, and several ranges to merge, even from small inputs."""
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 600)
    monkeypatch.setattr(merge, "RANGE_BYTES", 500)


def read(corpus: Path, split: str) -> list[list[int]]:
    """Token ids of each document, including delimiters."""
    manifest = Manifest.read(corpus)
    part = manifest.splits[split]
    tokens = np.fromfile(corpus / part.file, manifest.numpy_dtype)
    ends = np.fromfile(corpus / part.ends, "<u8").astype(int)
    return [document.tolist() for document in np.split(tokens, ends[:-1])]


def documents(corpus: Path) -> list[str]:
    """Decode all documents."""
    decoder = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    parts = [part for split in Manifest.read(corpus).splits for part in read(corpus, split)]
    assert all(part[-1] == 0 and 0 not in part[:-1] for part in parts)
    return decoder.decode_batch([part[:-1] for part in parts])


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def write_jsonl(path: Path, texts: list[str] = DOCUMENTS) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_gzip(folder: Path) -> Path:
    path = folder / "data.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(folder / "plain.jsonl").read_bytes()))
    (folder / "plain.jsonl").unlink()
    return path


def write_zstandard(folder: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    lines = write_jsonl(folder / "plain.jsonl").read_bytes().splitlines(keepends=True)
    path = folder / "data.json.zst"
    frames = (b"".join(lines[:20]), b"".join(lines[20:]))  # pzstd and concatenation make files of several frames
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    return path


def write_separated(folder: Path) -> Path:
    path = folder / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    return path


def write_folder(folder: Path) -> Path:
    for i, text in enumerate(DOCUMENTS):
        path = folder / "src" / f"part{i % 3}" / f"file{i}{'.py' if i % 2 else '.md'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((b"\xef\xbb\xbf" if i == 5 else b"") + text.encode())
    for left_out in (".git/config.py", "image.png", ".hidden.py", "__pycache__/x.py", "part0/empty.py"):
        path = folder / "src" / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if "empty" in left_out else b"\xff\x00")
    return folder / "src"


def write_parquet(folder: Path) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    parquet.write_table(table, folder / "data.parquet", row_group_size=17)
    return folder


def write_dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


INPUTS = ["jsonl", "gzip", "zstandard", "separated", "folder", "parquet", "dataset"]
WRITERS: list[Callable[[Path], Path]] = [
    lambda folder: write_jsonl(folder / "data.jsonl"),
    write_gzip,
    write_zstandard,
    write_separated,
    write_folder,
    write_parquet,
    write_dataset,
]


@pytest.mark.parametrize("write", WRITERS, ids=INPUTS)
@pytest.mark.usefixtures("small_units")
def test_every_kind_of_input(tmp_path: Path, tokenizer_path: Path, write: Callable[[Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in")
    manifest = prepare([source], tmp_path / "out", Settings(str(tokenizer_path)), workers=2, console=QUIET)
    assert Counter(documents(tmp_path / "out")) == Counter(DOCUMENTS)
    assert Manifest.read(tmp_path / "out") == manifest
    manifest.verify(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("write", WRITERS, ids=INPUTS)
def test_progress_reaches_the_end(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    inputs = find_inputs([write(tmp_path)]).read
    assert sum(task.size for task in tasks.cut(inputs, 600)) == sum(entry.size for entry in inputs)


def test_the_tokens_are_the_tokenizers(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl")
    prepare([source], tmp_path / "out", Settings(str(tokenizer_path)), workers=1, console=QUIET)
    tokenizer = vocabulary.tokenizer(tokenizer_path)
    expected = sorted([*tokenizer.encode(text).ids, 0] for text in DOCUMENTS)
    assert sorted(read(tmp_path / "out", "train") + (read_validation(tmp_path / "out"))) == expected


def read_validation(corpus: Path) -> list[list[int]]:
    return read(corpus, "validation") if "validation" in Manifest.read(corpus).splits else []


def test_the_same_bytes_for_any_number_of_workers_and_ranges(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 900)
    (tmp_path / "in").mkdir()
    sources = [write_folder(tmp_path / "in"), write_jsonl(tmp_path / "in" / "data.jsonl")]
    chosen = Settings(str(tokenizer_path), validation=0.2)
    results = []
    for workers, range_bytes in ((1, 2**28), (2, 500), (3, 64)):
        monkeypatch.setattr(merge, "RANGE_BYTES", range_bytes)
        out = tmp_path / f"out{workers}"
        prepare(sources, out, chosen, workers=workers, console=QUIET)
        results.append(digests(out))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 6


def test_more_units_than_files_may_be_open(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(merge, "RANGE_BYTES", 700)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    tokenizer = vocabulary.tokenizer(tokenizer_path)
    encoding = units.Encoding(tokenizer, 0, np.dtype("<u2"), validation=0.1)
    texts = [f"{i} {text}" for i in range(2) for text in DOCUMENTS]
    paths = [tmp_path / f"{i:07d}" for i in range(len(texts))]
    for number, (path, text) in enumerate(zip(paths, texts, strict=True)):
        units.encode_unit(path, number, [text], encoding)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 20, hard))
    try:
        splits = merge.merge(paths, tmp_path, encoding.dtype)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    Manifest("uint16", "t", "0", 2**16, None, splits).write(tmp_path)
    found = read(tmp_path, "train") + read(tmp_path, "validation")
    assert sorted(found) == sorted([*tokenizer.encode(text).ids, 0] for text in texts)


def test_the_validation_split_is_by_content_and_the_order_by_seed(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 4000)
    texts = [f"text {i} {'ab' * (i % 5)}" for i in range(400)]
    source = write_jsonl(tmp_path / "data.jsonl", texts * 2)
    splits = {}
    for seed in (0, 1):
        out = tmp_path / f"out{seed}"
        prepare([source], out, Settings(str(tokenizer_path), validation=0.25, seed=seed), workers=1, console=QUIET)
        splits[seed] = {name: read(out, name) for name in ("train", "validation")}
        train, validation = (Counter(map(tuple, splits[seed][name])) for name in ("train", "validation"))
        assert not train.keys() & validation.keys()
        assert set(train.values()) == set(validation.values()) == {2}
        assert 60 <= len(validation) <= 140  # 100 expected, 4.6 standard deviations
    assert sorted(splits[0]["validation"]) != sorted(splits[1]["validation"])
    tokenizer = vocabulary.tokenizer(tokenizer_path)
    place = {(*tokenizer.encode(text).ids, 0): i for i, text in enumerate(texts)}
    places = [place[tuple(document)] for document in splits[0]["train"]]
    correlation = np.corrcoef(places, np.arange(len(places)))[0, 1]
    assert abs(correlation) < 0.15  # 3.7 standard deviations for about 600 documents
    neighbours = np.mean(np.abs(np.diff(places)) == 1)
    assert neighbours < 0.05


def test_the_name_of_the_delimiter_in_a_text_is_text(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", ["a<|endoftext|>b", "", "c"])
    prepare([source], tmp_path / "out", Settings(str(tokenizer_path), validation=0), workers=1, console=QUIET)
    assert sorted(documents(tmp_path / "out")) == ["a<|endoftext|>b", "c"]


def test_no_delimiter_and_another_field(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"body": "abc"}\n\n{"body": "def"}')
    chosen = Settings(str(tokenizer_path), delimiter=None, text_field="body", validation=0, dtype="uint32")
    manifest = prepare([tmp_path / "data.jsonl"], tmp_path / "out", chosen, workers=1, console=QUIET)
    assert manifest.delimiter is None
    assert manifest.dtype == "uint32"
    tokenizer = vocabulary.tokenizer(tokenizer_path)
    assert sorted(read(tmp_path / "out", "train")) == sorted([tokenizer.encode("abc").ids, tokenizer.encode("def").ids])


@lru_cache
def load_phi() -> Tokenizer:
    return vocabulary.tokenizer("phi-1.5")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b c", " ", "  ", "\n", "\n\n", "\t", "x\ny", "'ll", "é", "9", "_"]), max_size=60)
)
def test_a_long_document_is_encoded_as_if_whole(pieces: list[str]) -> None:
    phi, text = load_phi(), "".join(pieces)
    before, units.LONG_DOCUMENT = units.LONG_DOCUMENT, 3
    try:
        (tokens,) = units.Encoding(phi, 50256, np.dtype("<u2")).encode([text])
    finally:
        units.LONG_DOCUMENT = before
    assert tokens.tolist() == [*phi.encode(text).ids, 50256]


INTERRUPTED = """
import sys
from pathlib import Path
from phi_fast.data.preparation import pipeline
from phi_fast.prepare import main

pipeline.MIN_UNIT_BYTES = 8000
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_is_taken_up(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", [f"{i} {text}" for i in range(40) for text in DOCUMENTS])
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 8000)
    chosen = Settings(str(tokenizer_path))
    prepare([source], tmp_path / "whole", chosen, workers=2, console=QUIET)

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = [str(source), "--tokenizer", str(tokenizer_path), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, *arguments], start_new_session=True)
    while len(list(partial.glob("*.index"))) < 6:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while _lives(process.pid):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)
    assert not out.exists()
    done = {path: path.stat().st_ino for path in partial.glob("*.index")}
    (partial / "0000003.tokens").write_bytes(b"cut short")

    monkeypatch.setattr("shutil.rmtree", lambda path, **_: None)  # keep the units
    with pytest.raises(PrepareError, match="holds work begun with other seed: run with the settings it was begun with"):
        prepare([source], out, Settings(str(tokenizer_path), seed=1), workers=1, console=QUIET)
    prepare([source], out, chosen, workers=1, console=QUIET)
    again = {path for path, inode in done.items() if path.stat().st_ino != inode}
    assert {path.name for path in again} == {"0000003.index"}
    assert digests(out) == digests(tmp_path / "whole")


def _lives(session: int) -> bool:
    """Return whether any process of the session is left."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", [f"{i} {text}" for i in range(100) for text in DOCUMENTS])
    arguments = [str(source), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list((tmp_path / "out.partial").glob("*.index"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, which signals workers, too
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "The same command takes up where this one was" in errors
    assert "Traceback" not in errors


def test_two_at_once_are_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl")
    with (
        pipeline._partial(tmp_path / "out", {}),
        pytest.raises(PrepareError, match="another prepare is writing"),
    ):
        prepare([source], tmp_path / "out", Settings(str(tokenizer_path)), workers=1, console=QUIET)


def damage_gzip(folder: Path) -> Path:
    path = write_gzip(folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def damage_zstandard(folder: Path) -> Path:
    path = write_zstandard(folder)
    path.write_bytes(path.read_bytes()[:-3])
    return path


def damage_parquet(folder: Path) -> Path:
    """The footer stays valid: only reading the rows detects the damage."""
    path = write_parquet(folder) / "data.parquet"
    data = bytearray(path.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    path.write_bytes(data)
    return path


def damage_parquet_footer(folder: Path) -> Path:
    path = write_parquet(folder) / "data.parquet"
    data = bytearray(path.read_bytes())
    data[-200:-8] = b"\xff" * 192
    path.write_bytes(data)
    return path


def damage_dataset(folder: Path) -> Path:
    path = write_dataset(folder)
    for shard in path.glob("*.arrow"):
        shard.write_bytes(shard.read_bytes()[:-1000])
    return path


def write_bytes(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def write_splits(folder: Path) -> Path:
    pytest.importorskip("datasets").DatasetDict(
        {"train": pytest.importorskip("datasets").Dataset.from_dict({"text": ["a"]})}
    ).save_to_disk(folder / "dict")
    return folder / "dict"


FAULTS = {
    "missing": (lambda folder: folder / "gone.txt", {}, r"gone\.txt does not exist"),
    "empty": (write_bytes("empty.txt", b""), {}, "there is nothing in the inputs"),
    "nothing known": (lambda folder: write_bytes("a.png", b"x")(folder).parent, {}, "--suffixes"),
    "splits": (write_splits, {}, r"holds the splits train: name those you want, such as .*dict/train"),
    "no column": (write_parquet, {"text_field": "body"}, r"has no column 'body', but id, text.*--text-field"),
    "no column in a dataset": (write_dataset, {"text_field": "body"}, r"has no column 'body', but text"),
    "not parquet": (write_bytes("a.parquet", b"x" * 99), {}, r"a\.parquet is not Parquet"),
    "gzip cut": (damage_gzip, {}, r"data\.jsonl\.gz is damaged: Compressed file ended"),
    "zstandard cut": (damage_zstandard, {}, r"data\.json\.zst is damaged: Truncated"),
    "parquet damaged": (damage_parquet, {}, r"(?s)data\.parquet is damaged: .*\w\. Get the file again"),
    "parquet footer damaged": (damage_parquet_footer, {}, r"data\.parquet is not Parquet: "),
    "dataset cut": (damage_dataset, {}, r"saved cannot be read as a dataset: .*Get it again"),
    "not gzip": (write_bytes("a.txt.gz", b"x" * 99), {}, r"a\.txt\.gz is damaged: Not a gzipped file"),
    "not UTF-8": (write_bytes("a.txt", b"\xff\xfe"), {}, r"a\.txt: 'utf-8' codec.*--skip-malformed"),
    "not JSON": (write_bytes("a.jsonl", b'{"text": "a"}\n\n{"text": \n'), {}, r"a\.jsonl, line 3: Expecting value"),
    "nested JSON": (write_bytes("a.jsonl", b"[" * 100_000), {}, r"line 1: maximum recursion depth.*--skip-malformed"),
    "no object": (write_bytes("a.jsonl", b'["a"]\n'), {}, r"line 1: expected a JSON object .* found list"),
    "no field": (write_bytes("a.jsonl", b'{"body": 1, "id": 2}\n'), {}, r"no field 'text' among body, id"),
    "no text": (write_bytes("a.jsonl", b'{"text": null}\n'), {}, r"'text' is NoneType, expected text"),
    "half a pair": (write_bytes("a.jsonl", b'{"text": "\\ud800"}\n'), {}, r"line 1: .*surrogates not allowed"),
    "only empty texts": (write_bytes("a.jsonl", b'{"text": ""}\n'), {}, "no documents for training"),
    "share": (write_parquet, {"validation": 1.0}, r"--validation 1\.0: expected a share"),
    "delimiter": (write_parquet, {"delimiter": "</s>"}, r"has no token '</s>'.*--delimiter None"),
    "dtype": (write_parquet, {"dtype": "int8"}, "--dtype 'int8' is not one of 'uint16', 'uint32'"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("small_units")
def test_what_a_fault_says(tmp_path: Path, tokenizer_path: Path, fault: str) -> None:
    write, options, message = FAULTS[fault]
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in")
    with pytest.raises((PrepareError, TokenizerError), match=message):
        prepare([source], tmp_path / "out", Settings(str(tokenizer_path), **options), workers=1, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_line_far_into_a_stream_is_named_by_its_number(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 300)
    path = write_jsonl(tmp_path / "data.jsonl")
    lines = path.read_text().splitlines()
    lines[41] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(PrepareError, match=r"data\.jsonl, line 42: Expecting property name"):
        prepare([path], tmp_path / "out", Settings(str(tokenizer_path)), workers=2, console=QUIET)
    (tmp_path / "out.partial").rename(tmp_path / "removed")
    chosen = Settings(str(tokenizer_path), skip_malformed=True)
    with (tmp_path / "log").open("w") as log:
        prepare([path], tmp_path / "out", chosen, workers=2, console=Console(file=log))
    assert Counter(documents(tmp_path / "out")) == Counter(DOCUMENTS[:41] + DOCUMENTS[42:])
    assert "left out 1 malformed records" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_a_package_that_is_not_installed(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    source = write_parquet(tmp_path) if module == "pyarrow" else write_dataset(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PrepareError, match=rf"needs {module}, .* pip install 'phi-fast\[prepare\]'"):
        prepare([source], tmp_path / "out", Settings(str(tokenizer_path)), workers=1, console=QUIET)


def test_ids_that_do_not_fit_are_refused_before_any_work(tmp_path: Path, tokenizer_path: Path) -> None:
    wide = vocabulary.tokenizer(tokenizer_path)
    wide.add_tokens([f"added{i}" for i in range(2**16)])
    wide.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "data.jsonl", ["added65535 a"])
    with pytest.raises(
        PrepareError, match=r"--dtype uint16 holds ids up to 65535, and tokenizer .* use --dtype uint32"
    ):
        prepare([source], tmp_path / "out", Settings(str(tmp_path), dtype="uint16"), console=QUIET)
    assert not (tmp_path / "out.partial").exists()
    manifest = prepare([source], tmp_path / "out", Settings(str(tmp_path)), workers=1, console=QUIET)
    assert manifest.dtype == "uint32"
    assert manifest.splits["train"].max_id == vocabulary.vocab_size(wide) - 1 > 2**16


def test_a_corpus_is_never_overwritten(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl")
    (tmp_path / "out").mkdir()
    prepare([source], tmp_path / "out", Settings(str(tokenizer_path)), workers=1, console=QUIET)
    before = digests(tmp_path / "out")
    with pytest.raises(PrepareError, match="exists and is not empty"):
        prepare([source], tmp_path / "out", Settings(str(tokenizer_path)), workers=1, console=QUIET)
    assert digests(tmp_path / "out") == before


def test_a_document_too_long_for_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"x" * 2000)
    inputs = pipeline.find_inputs([tmp_path / "a.txt"]).read
    with pytest.raises(
        PrepareError, match=r"a\.txt: a document is longer than 1000 bytes. Put <\|endoftext\|> between"
    ):
        list(tasks.cut(inputs, 300))


def test_the_command(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "data.jsonl")
    out = tmp_path / "out"
    arguments = [str(source), "--tokenizer", str(tokenizer_path), "--validation", "0.2", "--out", str(out)]
    assert main([*arguments, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "tokens" in printed and "MB/s" in printed
    manifest = Manifest.read(out)
    assert f"train: {manifest.splits['train'].documents} documents, " in printed

    assert main(["--inspect", str(out), "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    assert "checksums verified" in printed
    for name, split in manifest.splits.items():
        assert f"{name}: {split.tokens:,} tokens, {split.documents:,} documents" in printed
        assert vocabulary.tokenizer(out).decode(read(out, name)[1][:-1]).strip() in printed

    data = bytearray((out / "train.bin").read_bytes())
    data[100] ^= 1
    (out / "train.bin").write_bytes(data)
    assert main(["--inspect", str(out)]) == 1
    captured = capsys.readouterr()
    assert "train.bin: block 0 (from byte 0) has sha256" in captured.err
    assert "checksums verified" not in captured.out


def test_the_command_starts_without_torch() -> None:
    check = "import sys, phi_fast.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a --tokenizer and where to write, --out"),
        (["a.txt", "--tokenizer", "phi-1.5"], "name a --tokenizer and where to write, --out"),
        (["--tokenizer", "phi-1.5", "--out", "o"], "name the files or folders to prepare"),
        (["a.txt", "--adopt", "b.bin", "--tokenizer", "phi-1.5", "--out", "o"], "and not both"),
        (["a.txt", "--tokenizer", "phi", "--out", "o"], "tokenizer 'phi' is neither 'phi-1.5'"),
        (["a.txt", "--tokenizer", "phi-1.5", "--out", "o", "--seed", "-1"], "--seed -1: expected 0 to below 2**64"),
        (["a.txt", "--tokenizer", "phi-1.5", "--out", "o", "--workers", "0"], "--workers 0: expected at least 1"),
        (["--inspect", "o", "--samples", "-1"], "--samples -1: expected 0 or more"),
        (["--inspect", "gone"], "gone is not a complete corpus"),
    ],
)
def test_a_command_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["a.txt", "--tokeniser", "phi-1.5"])
    assert stopped.value.code != 0

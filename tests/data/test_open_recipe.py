"""`prepare --recipe`: the corpora of the recipes with open data, from small data sets in the hub's layout."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from phi_fast import prepare
from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation import needs, pipeline
from phi_fast.open_data import OPEN_DATA
from phi_fast.recipes import RECIPES

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def texts(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}: {'lorem ipsum dolor ' * (number % 7)}end\n" for number in range(count)]


def make_source(folder: Path) -> Path:
    """The hub's layout: Parquet files with a column `text` and others, in folders OWNER/NAME/SUBSET."""
    files = {
        "HuggingFaceTB/smollm-corpus/cosmopedia-v2/train-00000-of-00002.parquet": texts("textbook", 80),
        "HuggingFaceTB/smollm-corpus/cosmopedia-v2/train-00001-of-00002.parquet": texts("story", 80),
        "HuggingFaceTB/smollm-corpus/fineweb-edu-dedup/train-00000-of-00001.parquet": texts("page", 90),
        "HuggingFaceTB/cosmopedia/data/openstax/train-00000-of-00001.parquet": texts("chapter", 40),
        "Avelina/python-edu-cleaned/data/train-00000-of-00001.parquet": texts("def f", 70),
    }
    for name, documents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"prompt": [f"write about {text}" * 20 for text in documents], "text": documents}
        parquet.write_table(pyarrow.table(columns), path)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("hub"))


def arguments(source: Path, tokenizer: Path, out: Path) -> list[str]:
    options = {"source": source, "tokenizer": tokenizer, "out": out, "validation": 0.2, "workers": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["--recipe", "phi-1.5-open", *words]


@pytest.fixture
def command(source: Path, small_tokenizer: Path, tmp_path: Path) -> list[str]:
    return arguments(source, small_tokenizer, tmp_path / "data")


@pytest.fixture(scope="module")
def made(source: Path, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora of phi-1.5-open. Read only."""
    out = tmp_path_factory.mktemp("made") / "data"
    assert prepare.main(arguments(source, small_tokenizer, out)) == 0
    return out


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents(corpus: Path) -> int:
    return sum(split.documents for split in Manifest.read(corpus).splits.values())


def test_every_corpus_is_made_and_then_skipped(
    tmp_path: Path, command: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert prepare.main(command) == 0
    assert documents(out / "synthetic") == 200
    assert documents(out / "code") == 70
    said = capsys.readouterr().out
    stored = sum(path.stat().st_size for path in source.rglob("*.parquet"))
    assert stored
    for line in (
        r"synthetic, in place of about 20 B tokens of synthetic textbooks:",
        r"HuggingFaceTB/smollm-corpus, cosmopedia-v2, revision 3ba9d60.*, licence odc-by: 28 B tokens",
        r"synthetic: 3 files, 0.0 kB to receive, .* of text",
        r"disk: .* at .*data, of which .* stay; free: ",
        r"network: 0.0 kB",
        r"time: .* to encode on 1 cores at .* MB/s each, measured now",
        r"warning: code is read 7.5 times",  # 20% of 150 B tokens, of 4 B
        rf"train with: python -m phi_fast.train --recipe phi-1.5-open --data {re.escape(str(out))}",
    ):
        assert re.search(line, said), line
    assert not re.search("warning: synthetic is read 2", said)  # 80% of 150 B tokens, of 53 B: 2.3 epochs
    record = json.loads((out / "sources.json").read_text())
    assert record["recipe"] == "phi-1.5-open"
    assert record["corpora"]["code"][0]["dataset"] == "Avelina/python-edu-cleaned"
    before = digests(out)
    assert prepare.main(command) == 0
    assert digests(out) == before
    assert capsys.readouterr().out.count("is complete") == 2


def test_an_interrupted_recipe_goes_on(
    tmp_path: Path,
    command: list[str],
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, expected = tmp_path / "data", digests(made)
    shutil.copytree(made, out)
    shutil.rmtree(out / "code")
    merged = pipeline.merge

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "merge", killed)
    assert prepare.main(command) == 130
    assert (out / "code.partial").is_dir() and not (out / "code").exists()
    monkeypatch.setattr(pipeline, "merge", merged)
    capsys.readouterr()
    assert prepare.main(command) == 0
    said = capsys.readouterr().out
    assert "kept 1 of 1 parts from before" in said and "are done, from a run before" in said
    assert digests(out) == expected


def test_a_dry_run_writes_nothing(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "disk: " in said and "nothing was written" in said
    assert not (tmp_path / "data").exists()


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs, "free", lambda out: 1000)
    assert prepare.main(command) == 1
    assert re.search(r"data needs .* kB, and its disk has 1.0 kB free", capsys.readouterr().err)
    assert not (tmp_path / "data").exists()


def test_the_disk_holds_finished_corpora_and_the_work_on_one() -> None:
    first = needs.Needs("a", 1, 0, text=3000, documents=10)
    second = needs.Needs("b", 1, 0, text=6000, documents=20, begun=500)
    # 1000 tokens of 2 bytes and 10 ends: 2080; beside it, while it is made, 2160. Of the second, 4160 and 4320.
    assert needs.disk_needed([first], 2) == 2080 + 2160
    assert needs.disk_needed([first, second], 2) == 2080 + 4160 + 4320 - 500
    assert needs.disk_needed([], 2) == 0


def test_only_the_column_of_the_text_counts(source: Path, tmp_path: Path) -> None:
    from phi_fast.data.preparation.inputs import find_inputs

    folder = source / "HuggingFaceTB/smollm-corpus/cosmopedia-v2"
    found = needs.measure("x", find_inputs([folder]), "text", tmp_path)
    length = sum(len(text) + 4 for text in (*texts("textbook", 80), *texts("story", 80)))  # Parquet: 4 bytes of length
    assert (found.files, found.network, found.documents) == (2, 0, 160)
    assert 0.5 * length < found.text < 1.2 * length


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "phi-1.5"], r"--recipe phi-1.5: its data is not public.*phi-1.5-open, phi-1.5-web-open"),
        (["--recipe", "phi-1.5-open", "x.jsonl"], "--recipe names its own inputs"),
        (["--recipe", "phi-1.5-open", "--source", "/nowhere"], "/nowhere/HuggingFaceTB/smollm-corpus.* does not exist"),
        (["--dry-run", "--tokenizer", "x", "--out", "y", "z"], "--source and --dry-run belong to --recipe"),
        (["--recipe", "phi-1.5-open", "--attempts", "0"], "--attempts 0.*at least 1 attempt"),
    ],
)
def test_what_cannot_be_done_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_another_tokenizer_is_refused(
    tmp_path: Path, command: list[str], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "data")
    assert prepare.main([*command, "--tokenizer", "phi-1.5"]) == 1
    assert re.search(r"synthetic was prepared with tokenizer .* not 'phi-1.5'", capsys.readouterr().err)


@pytest.mark.parametrize("name", OPEN_DATA)
def test_the_facts_are_complete(name: str) -> None:
    data, recipe = OPEN_DATA[name], RECIPES[name]
    assert recipe.mixture == data.weights
    assert data.corpora.keys() == data.weights.keys() == data.instead_of.keys()
    for one in (source for sources in data.corpora.values() for source in sources):
        assert re.fullmatch("[0-9a-f]{40}", one.revision)
        assert one.licence and one.counted
        assert one.url == f"hf://datasets/{one.dataset}@{one.revision}/{one.folder}"
    reported = RECIPES[name.removesuffix("-open")]
    assert recipe.replace(data=reported.data, mixture=reported.mixture) == reported != recipe
    assert sorted(recipe.mixture.values()) == sorted(reported.mixture.values())


def test_the_trainer_names_the_command_for_missing_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from phi_fast.training.corpora import Corpora
    from phi_fast.training.options import parse

    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'web' is not at .*web; .*prepare --recipe phi-1.5-web-open`"):
        Corpora(parse(["--recipe", "phi-1.5-web-open"]), None, Console(quiet=True))
    with pytest.raises(FileNotFoundError, match=r"prepare INPUTS --tokenizer phi-1\.5"):
        Corpora(parse(["--recipe", "phi-1.5-web"]), None, Console(quiet=True))

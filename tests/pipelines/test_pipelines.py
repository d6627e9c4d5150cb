"""The stages give the bytes of `prepare`, for any number of tasks, after kills, and with each kind of step."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from model_folders import tiny_tokenizer

pytest.importorskip("datatrove")
pytest.importorskip("zstandard")

from datatrove.data import Document as TheirDocument

from phi_fast.curation.documents import Document, Drop
from phi_fast.curation.exact import ExactDuplicates
from phi_fast.curation.near import NearDuplicates, NearSettings
from phi_fast.curation.run import Running
from phi_fast.curation.run import run as curate
from phi_fast.curation.shards import Reading
from phi_fast.curation.threshold import Threshold
from phi_fast.data.preparation import pipeline
from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.errors import UsageError
from phi_fast.pipelines import corpus_stages
from phi_fast.pipelines.judges import DecideBlock, JudgeBlock, SurveyBlock
from phi_fast.pipelines.stages import Stage
from phi_fast.pipelines.texts import ReadTexts, WriteTexts
from phi_fast.terminal import console

QUIET = console(quiet=True)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 2048)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return Settings(str(tmp_path / "tokenizer.json"), validation=0.1, seed=3)


def make_inputs(folder: Path, files: int = 5) -> Path:
    """JSON lines of several sizes; two of them compressed. Texts repeat, within a file and across files."""
    folder.mkdir()
    rng = random.Random(1)
    for i in range(files):
        texts = [
            f"{rng.choice(['good', 'bad'])} text {rng.randrange(40)} " * rng.randrange(1, 9) for _ in range(30 * i)
        ]
        data = "".join(json.dumps({"text": text, "id": f"{i}-{j}", "n": j}) + "\n" for j, text in enumerate(texts))
        if i % 2:
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(data.encode(), mtime=0))
        else:
            (folder / f"{i}.jsonl").write_text(data or "\n")
    return folder


def add_texts(folder: Path) -> Path:
    """Small text files, which share units, and a long one between them."""
    (folder / "docs").mkdir()
    for i in range(12):
        (folder / "docs" / f"{i:02d}.txt").write_text(f"text {i} " * 60)
    (folder / "docs" / "05-long.md").write_text("long " * 2000)
    return folder


def run_stage(stage: Stage, ranks: Sequence[int] | None = None) -> list[Any]:
    """Run the tasks of a stage here, the last one first. Returns the documents at the end of the pipelines."""
    results = []
    for rank in reversed(range(stage.tasks) if ranks is None else ranks):
        data: Any = None
        for block in deepcopy(stage.pipeline):
            data = block.run(data, rank, stage.tasks)
        results += list(data)
    return results


def run_all(stages: Sequence[Stage]) -> None:
    for stage in stages:
        run_stage(stage)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Good:
    """Drops texts with "bad" in them, and marks the others."""

    name = "good"

    def settings(self) -> dict[str, Any]:
        return {}

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        for document in documents:
            document.scores["length"] = len(document.text)
            document.text = document.text.upper()
        return [Drop("a bad word") if "BAD" in document.text else None for document in documents]


def records(folder: Path) -> list[dict]:
    return [
        {"text": document.text, "id": document.id, **document.metadata}
        for document in ReadTexts([folder]).run(None, 0, 1)
    ]


@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_without_steps_the_corpus_is_that_of_prepare(tmp_path: Path, settings: Settings, tasks: int) -> None:
    inputs = add_texts(make_inputs(tmp_path / "in"))
    prepare([inputs], tmp_path / "alone", settings, workers=1, console=QUIET)
    stages = corpus_stages([inputs], tmp_path / "work", tmp_path / "out", settings, tasks=tasks)
    assert [stage.name for stage in stages] == ["01-count", "02-encode", "03-merge"]
    run_all(stages[:2])
    units = sorted(path.name for path in (tmp_path / "out.partial").glob("*.index"))
    assert len(units) > 12
    run_stage(stages[2])
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_the_merge_encodes_nothing(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit that `prepare` needs is one that the tasks encoded."""
    inputs = add_texts(make_inputs(tmp_path / "in"))
    stages = corpus_stages([inputs], tmp_path / "work", tmp_path / "out", settings, tasks=2)
    run_all(stages[:2])

    def never(*_: Any) -> None:
        raise AssertionError("a unit is encoded again")

    monkeypatch.setattr(pipeline.ProcessPoolExecutor, "submit", never)
    monkeypatch.setattr(pipeline.ProcessPoolExecutor, "map", lambda self, *given: map(*given))
    run_stage(stages[2])
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("tasks", [1, 4])
def test_with_steps_the_corpus_is_that_of_the_texts_they_leave(tmp_path: Path, settings: Settings, tasks: int) -> None:
    inputs = make_inputs(tmp_path / "in")
    stages = corpus_stages(
        [inputs], tmp_path / "work", tmp_path / "out", settings, [Good(), ExactDuplicates(), Good()], tasks=tasks
    )
    names = "01-filter 02-exact-dedup-survey 03-exact-dedup-decide 04-filter 05-count 06-encode 07-merge"
    assert " ".join(stage.name for stage in stages) == names
    run_all(stages)
    prepare([tmp_path / "work" / "texts-1"], tmp_path / "alone", settings, workers=1, console=QUIET)
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    # By hand: upper case, without "bad", the first of each text in the order of the files.
    expected: dict[str, dict] = {}
    for path in sorted(inputs.iterdir()):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for line in data.decode().splitlines():
            if line and "bad" not in line:
                record = json.loads(line)
                expected.setdefault(record["text"].upper().strip(), record)
    found = records(tmp_path / "work" / "texts-1")
    assert [record["text"].strip() for record in found] == list(expected)
    assert [record["id"] for record in found] == [record["id"] for record in expected.values()]
    assert [record["n"] for record in found] == [record["n"] for record in expected.values()]
    assert all(record["scores"] == {"length": len(record["text"])} for record in found)


def test_the_texts_do_not_depend_on_the_number_of_tasks(tmp_path: Path, settings: Settings) -> None:
    inputs = make_inputs(tmp_path / "in")
    found = []
    for tasks in (1, 2, 7):
        folder = tmp_path / f"work-{tasks}"
        stages = corpus_stages([inputs], folder, tmp_path / "out", settings, [ExactDuplicates()], tasks=tasks)
        run_all(stages[:4])
        found.append((digests(folder / "texts-0"), digests(folder / "texts-1")))
    assert found[0] == found[1] == found[2]
    assert [len(texts) for texts in found[0]] == [4, 4]  # of five inputs, the first is empty


def test_a_task_that_was_killed_leaves_no_part_and_goes_on(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "in")
    folder = tmp_path / "texts"
    writing = WriteTexts(folder).run(ReadTexts([inputs], done=folder).run(None, 0, 1), 0, 1)
    for _ in range(45):  # into the second file that has documents
        next(writing)
    assert len([path for path in folder.iterdir() if path.name.startswith("part-")]) == 1
    del writing
    kept = (folder / "part-00000001.jsonl.zst").stat()
    assert len(list(WriteTexts(folder).run(ReadTexts([inputs], done=folder).run(None, 0, 1), 0, 1))) == 60 + 90 + 120
    assert (folder / "part-00000001.jsonl.zst").stat().st_mtime_ns == kept.st_mtime_ns
    assert sorted(path.name for path in folder.iterdir()) == [f"part-0000000{i}.jsonl.zst" for i in (1, 2, 3, 4)]
    assert len(records(folder)) == 300


def test_units_that_are_there_are_kept_and_missing_ones_are_named(tmp_path: Path, settings: Settings) -> None:
    inputs = make_inputs(tmp_path / "in")
    prepare([inputs], tmp_path / "alone", settings, workers=1, console=QUIET)
    stages = corpus_stages([inputs], tmp_path / "work", tmp_path / "out", settings, tasks=2)
    with pytest.raises(UsageError, match="run the stage that counts units first"):
        run_stage(stages[1])
    run_stage(stages[0])
    run_stage(stages[1], [0])  # files 0, 2 and 4; unit 0 is that of the empty file
    with pytest.raises(UsageError, match=r"units are missing in .*out\.partial, the first is 0000001"):
        run_stage(stages[2])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.index")}
    run_stage(stages[1])
    assert before == {path: path.stat().st_mtime_ns for path in before}
    run_stage(stages[2])
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_changed_inputs_settings_and_steps_are_refused(tmp_path: Path, settings: Settings) -> None:
    inputs = make_inputs(tmp_path / "in")
    given = [inputs], tmp_path / "work", tmp_path / "out"
    stages = corpus_stages(*given, settings, tasks=2)
    run_stage(stages[0])
    with pytest.raises(UsageError, match="was begun with other settings: give"):
        corpus_stages(*given, Settings(settings.tokenizer, seed=4), tasks=2)
    with pytest.raises(UsageError, match="was begun with other steps, reading, tasks: give"):
        corpus_stages(*given, settings, [Good()], tasks=3)
    (inputs / "0.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(UsageError, match="was begun with other inputs: give"):
        corpus_stages(*given, settings, tasks=2)
    with pytest.raises(UsageError, match=r"0\.jsonl or a file beside it has changed"):
        run_stage(stages[1])


def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, settings: Settings) -> None:
    inputs = make_inputs(tmp_path / "in")
    given = [inputs], tmp_path / "work"
    with pytest.raises(UsageError, match="tasks=0"):
        corpus_stages(*given, tmp_path / "out", settings, tasks=0)
    with pytest.raises(UsageError, match="Document is no step"):
        corpus_stages(*given, tmp_path / "out", settings, [Document("a", "b")])
    with pytest.raises(UsageError, match="exists and is not empty"):
        corpus_stages(*given, inputs, settings)
    with pytest.raises(UsageError, match="conversations are prepared on one machine"):
        corpus_stages(*given, tmp_path / "out", Settings(settings.tokenizer, chat=True))
    with pytest.raises(UsageError, match="does not exist"):
        corpus_stages([tmp_path / "absent"], tmp_path / "work", tmp_path / "out", settings)
    assert not (tmp_path / "work").exists()


def test_a_malformed_record_stops_the_task_or_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nno JSON\n{"text": "two"}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl:2: not JSON"):
        list(ReadTexts([tmp_path / "a.jsonl"]).run(None, 0, 1))
    block = ReadTexts([tmp_path / "a.jsonl"], Reading(skip_malformed=True))
    assert [document.text for document in block.run(None, 0, 1)] == ["one", "two"]
    assert block.stats["malformed"].total == 1


def test_a_judge_is_a_block_behind_any_reader(tmp_path: Path) -> None:
    given = [TheirDocument(text, f"id {text}", metadata={"a": 1}) for text in ("fine", "bad", "more")]
    block = JudgeBlock(Good())
    found = list(block.run(iter(given), 0, 1))
    assert [(document.text, document.id) for document in found] == [("FINE", "id fine"), ("MORE", "id more")]
    assert found[0].metadata == {"a": 1, "scores": {"length": 4}}
    counts = {name: block.stats[name].total for name in ("total", "forwarded", "dropped", "dropped_a bad word")}
    assert counts == {"total": 3, "forwarded": 2, "dropped": 1, "dropped_a bad word": 1}
    # Behind another reader than ReadTexts, there is one file per task.
    list(WriteTexts(tmp_path / "texts").run(iter(found), 5, 8))
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["part-00000005.jsonl.zst"]
    assert [record["text"] for record in records(tmp_path / "texts")] == ["FINE", "MORE"]


def test_blocks_in_the_wrong_place_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ExactDuplicates is no step that judges"):
        JudgeBlock(ExactDuplicates())
    foreign = iter([TheirDocument("a", "b")])
    with pytest.raises(UsageError, match="document b was not read by ReadTexts"):
        list(SurveyBlock(ExactDuplicates(), tmp_path).run(foreign, 0, 1))
    with pytest.raises(UsageError, match="run it as one task, not 2"):
        list(DecideBlock(ExactDuplicates(), tmp_path).run(None, 0, 2))
    unwritable = iter([TheirDocument("a", "b", metadata={"x": float("nan")})])
    with pytest.raises(UsageError, match="document b cannot be written: a field that JSON cannot hold"):
        list(WriteTexts(tmp_path / "texts").run(unwritable, 0, 1))
    assert list((tmp_path / "texts").iterdir()) == []


def test_the_texts_are_those_of_curate(tmp_path: Path, settings: Settings) -> None:
    """The commands of `curate`, one after the other, and the stages: the same lines, for near duplicates too."""
    pytest.importorskip("rensa")
    rng = random.Random(0)
    (tmp_path / "in").mkdir()
    bases = [[f"w{rng.randrange(5000)}" for _ in range(120)] for _ in range(20)]
    for i in range(3):
        with (tmp_path / "in" / f"{i}.jsonl").open("w") as file:
            for j, words in enumerate(bases):
                changed = [*words[:-2], f"x{i}", f"y{j}"]  # of one base: a similarity of some 0.9
                file.write(json.dumps({"text": " ".join(changed), "scores": {"quality": (i + j) % 5}}) + "\n")
    steps = [Threshold("quality", 1), NearDuplicates(NearSettings())]
    stages = corpus_stages([tmp_path / "in"], tmp_path / "work", tmp_path / "out", settings, steps, tasks=2)
    run_all(stages[:4])
    source = tmp_path / "in"
    for i, step in enumerate(steps):
        curate(step, [source], tmp_path / f"curated-{i}", Running(workers=1), QUIET)
        source = tmp_path / f"curated-{i}"
        parts = sorted((tmp_path / "work" / f"texts-{i}").iterdir())
        assert lines(parts) == lines(sorted(source.glob("part-*")))
    assert len(lines(parts)) == 20  # one of each base: each has a text with a score of at least 1


def lines(parts: list[Path]) -> list[bytes]:
    import zstandard

    found = []
    for part in parts:
        with part.open("rb") as file:
            found += zstandard.ZstdDecompressor().stream_reader(file).read().splitlines()
    return found

"""The thesis on two cores: what is read from packages, what is filtered, and what the figures say."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.experiments import textbooks
from benchmarks.experiments.thesis import comparison, corpora, documents, draw, exercises, filters, packages, page, runs
from benchmarks.experiments.thesis.corpora import Corpora
from benchmarks.experiments.thesis.documents import Document
from benchmarks.experiments.thesis.packages import Package
from phi_fast.errors import UsageError

SENTENCES = [f"The {word} of the reader is to see that the words {word} have a place in it. " for word in "abcdefghij"]


def package(**changes: Any) -> Package:
    return replace(Package("raw", "x", "1:2.0", "all", 1, ""), **changes)


def built(folder: Path, content: dict[str, bytes]) -> Package:
    """Make a Debian package of some files with dpkg-deb, and its entry in the list."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    root = folder / "root"
    control = b"Package: x\nVersion: 2.0\nArchitecture: all\nMaintainer: N <n@example.org>\nDescription: x\n"
    for path, data in {**content, "DEBIAN/control": control}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    made = folder / "x_2.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", "-Znone", root, made], check=True, stdout=subprocess.DEVNULL)
    size, digest = made.stat().st_size, hashlib.sha256(made.read_bytes()).hexdigest()
    return package(version="2.0", size=size, sha256=digest)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("usr/doc/a.html", "usr/doc/*.html", True),
        ("usr/doc/b/a.html", "usr/doc/*.html", False),
        ("usr/doc/b/c/a.html", "usr/doc/**/*.html", True),
        ("usr/doc/a.html", "usr/doc/**/*.html", True),
        ("man4/x.gz", "man[457]/*.gz", True),
        ("man6/x.gz", "man[457]/*.gz", False),
        ("usr/print.html", "**/print.html", True),
        ("usr/blueprint.html", "**/print.html", False),
        ("aXhtml", "a.html", False),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert package(include=(pattern,)).wants(path) is expected


def test_every_listed_package_is_pinned_and_described() -> None:
    found = packages.pinned()
    assert {p.role for p in found} == set(packages.ROLES)
    assert len({p.name for p in found}) == len(found)
    for each in found:
        assert len(each.sha256) == 64
        assert each.role == "raw" or (each.title and each.licence), each.name
        assert each.format in documents.READERS
    epoch = package(version="1:2.0-1~x+y")
    assert epoch.file == "x_1%3a2.0-1~x+y_all.deb"  # as apt-get names it


def test_files_of_a_package_become_documents(tmp_path: Path) -> None:
    long = "A sentence of the manual, which is long enough. " * 10
    html = f"<html><body><p>{long}</p><script>var x = 1;</script></body></html>"
    content = {
        "usr/share/doc/x/index.html": html.encode(),
        "usr/share/doc/x/changelog.gz": gzip.compress(f"x (1.0)  \r\n\n\n\n{long}".encode()),
        "usr/share/doc/x/README": long.encode("utf-16"),  # holds NUL: not text
        "usr/share/doc/x/short.txt": b"too short",
        "usr/share/doc/x/image.png": long.encode(),
        "usr/share/doc/x/broken.txt.gz": b"\x1f\x8bnot gzip",
        "usr/lib/notes.txt": long.encode(),
    }
    pytest.importorskip("resiliparse")
    found = list(documents.read(built(tmp_path, content), tmp_path))
    assert [d.path.rpartition("/")[2] for d in found] == ["changelog.gz", "index.html"]
    assert found[0].text.startswith("x (1.0)\n\nA sentence")
    assert found[1].text == long.strip()


def test_a_changed_package_is_refused_and_a_missing_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(tmp_path, {"usr/share/doc/x/README": b"x"})
    packages.fetch([made], tmp_path)
    (tmp_path / made.file).write_bytes(b"changed")
    with pytest.raises(UsageError, match=f"expected {made.sha256}: delete it"):
        packages.fetch([made], tmp_path)
    with pytest.raises(UsageError, match="dpkg-deb cannot read"):
        list(packages.files(made, tmp_path))
    monkeypatch.setattr(packages, "_download", lambda *_: None)
    monkeypatch.setattr(packages.shutil, "which", lambda _: "/usr/bin/apt-get")
    with pytest.raises(UsageError, match=r"1 of 1 packages.*snapshot.*y_1%3a2\.0_all\.deb"):
        packages.fetch([package(name="y", sha256="0" * 64)], tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="apt-get is not installed"):
        packages.fetch([package(name="y", sha256="0" * 64)], tmp_path)


def test_the_draw_leaves_out_updates_translations_and_the_sources_of_books() -> None:
    record = {"Version": "1", "Size": "200000", "Section": "doc", "Filename": "pool"}
    text = "\n\n".join(
        "\n".join(f"{k}: {v}" for k, v in (record | {"Package": name} | changes).items()) + "\n continued: no"
        for name, changes in {
            "good": {},
            "same-source": {"Source": "good (1.0)"},
            "updated": {"Version": "1+deb12u1"},
            "guide-pt-br": {},
            "guide-de": {},
            "small": {"Size": "99999"},
            "program": {"Section": "utils"},
            "program-dbgsym": {"Section": "debug"},
            "of-a-book": {"Source": "book"},
        }.items()
    )
    drawn = draw.draw(draw.records(text), {"book"})
    assert len(drawn) == 2
    assert {r["Package"] for r in drawn} <= {"good", "same-source", "program"}


def test_duplicates_are_found_and_others_kept() -> None:
    pytest.importorskip("rensa")
    base = "".join(f"word{i} " for i in range(300))
    near = base.replace("word150 ", "changed ")
    other = "".join(f"other{i} " for i in range(300))
    found = [Document("x", str(i), text) for i, text in enumerate([base, base.upper(), near, other])]
    assert list(filters.exact_duplicates(found)) == [1]
    assert list(filters.near_duplicates(found)) == [1, 2]  # 5 of 301 shingles changed: Jaccard 291 / 301


def test_the_classifier_keeps_what_resembles_the_exemplars(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rensa")
    rng = np.random.default_rng(0)

    def make(words: str, count: int, name: str) -> list[Document]:
        choice = [*(words.split() * 10), *(f"common{i}" for i in range(100))]
        return [Document(name, str(i), " ".join(rng.choice(choice, 120))) for i in range(count)]

    teach, dull = "we explain example chapter exercise learn because", "fix bug release merge upload closes version"
    raw = make(dull, 70, "dull") + make(teach, 30, "teach")
    monkeypatch.setattr(filters, "gopher", lambda found: {0: "gopher_short_doc"})
    chosen = filters.filtered([*raw, raw[5]], make(teach, 60, "exemplar"), keep=0.2)
    assert {d.package for d in chosen.documents} == {"teach"}
    assert chosen.dropped["exact duplicate"] == {"documents": 1, "bytes": raw[5].size}
    assert chosen.dropped["gopher_short_doc"]["documents"] == 1
    kept, all_bytes = sum(d.size for d in chosen.documents), sum(d.size for d in raw[1:])
    assert 0.2 * all_bytes <= kept < 0.2 * all_bytes + max(d.size for d in raw)


def test_a_negative_label_does_not_lower_its_own_score() -> None:
    rng = np.random.default_rng(1)

    def make(count: int) -> list[Document]:
        return [Document("x", str(i), " ".join(rng.choice([f"w{j}" for j in range(200)], 120))) for i in range(count)]

    found = make(120)
    labelled = np.random.default_rng(filters.SEED)
    labelled.permutation(60)
    negative = labelled.permutation(120)[:60]
    scores, accuracy = filters.teaching(found, make(60), labels=60)
    others = np.delete(scores, negative)
    assert abs(scores[negative].mean() - others.mean()) < 0.06  # all text is alike, so no label can be known
    assert 0.3 < accuracy < 0.7


@pytest.mark.slow  # spaCy and datatrove take seconds to import
def test_gophers_rules_are_datatroves() -> None:
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    texts = ["".join(SENTENCES), "too short", "the same line of text\n" * 100]
    reasons = filters.gopher([Document("x", str(i), text) for i, text in enumerate(texts)], workers=1)
    assert reasons[1] == "gopher_short_doc"
    assert 2 in reasons


def test_texts_are_cut_shuffled_and_limited() -> None:
    found = [Document("x", str(i), f"{i} " * 8000) for i in range(5)]
    assert corpora.shuffled(found) == corpora.shuffled(found[::-1])
    assert len(corpora.limited(found, 40_000)) == 2
    texts = corpora.pieces(found, 25_000)
    assert [len(text) for text in texts] == [corpora.PIECE] * 2
    gram = "a b c d e f g h i j k l m"
    assert set(corpora.ngrams(gram)) == set(corpora.ngrams(gram.upper().replace(" ", "\n")))
    assert not set(corpora.ngrams(gram)) & set(corpora.ngrams(gram.replace("m", "n")))
    assert not list(corpora.ngrams(gram[:-2]))
    planted = [Document("x", "", text) for text in (f"before {gram}, after", f"before {gram[:-1]}, after")]
    assert corpora.uncontaminated(planted, set(corpora.ngrams(gram))) == planted[1:]


def test_reference_solutions_are_right() -> None:
    for exercise in exercises.read():
        space: dict[str, Any] = {}
        exec(exercise.prompt + exercise.reference, space)
        assert all(eval(test, space) for test in exercise.tests), exercise.name
        assert exercises.cut(exercise.reference + "\nprint(1)") == exercise.reference


def test_a_right_program_passes_in_the_sandbox_and_a_wrong_one_fails() -> None:
    exercise = exercises.read()[0]
    programs = [exercise.program(exercise.reference), exercise.program("    return 5\n")]
    assert [result.passed for result in exercises.run_programs(programs)] == [True, False]


def test_log_probability_of_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoding", (), {"ids": list(text.encode())})

    def three_bits_per_byte(model: Any, requests: Any) -> Any:
        return ((i, (-len(r.continuation) * math.log(2) * 3, False)) for i, r in enumerate(requests))

    monkeypatch.setattr(exercises, "log_likelihoods", three_bits_per_byte)
    assert exercises.solutions(None, Tokenizer(), exercises.read()) == pytest.approx(3)  # type: ignore[arg-type]


# Differences 1, 2, 3 have mean 2 and standard deviation 1; t(0.975, 2) = 4.302653 in any table.
VALUES = {"raw": (10.0, 10.0, 10.0), "filtered": (11.0, 12.0, 13.0), "books": (7.0, 7.1, 7.2)}


def line(arm: str, seed: int, value: float) -> dict[str, Any]:
    machine = {"device": "a processor", "isa": "amx", "versions": dict.fromkeys(("torch", "numpy", "tokenizers"), "1")}
    return {
        "arm": arm,
        "seed": seed,
        "plan": {"tokens": 2048},
        "held_out": {"essays": value - 1, "Python": value + 1},
        "own": dict.fromkeys(VALUES, value),
        "exercises": {"passed": 0, "programs": 96, "solved": 0, "bits_per_byte": value},
        "step_ms": 1000.0,
        "judging_seconds": 59.0,
        "machine": machine,
        "commit": "abc",
        "date": "2026-01-01",
    }


RUNS = [line(arm, seed, value) for arm, values in VALUES.items() for seed, value in enumerate(values)]


def test_differences_are_paired_by_seed() -> None:
    found = comparison.difference(RUNS[::-1], "filtered", "raw")
    assert found.values == (1.0, 2.0, 3.0)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert found.p == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641 with 2 degrees of freedom: 1 − t/√(2 + t²)
    assert 1 <= found.bootstrap[0] < 2 < found.bootstrap[1] <= 3
    with pytest.raises(ValueError, match="1 seeds in common"):
        comparison.difference([r for r in RUNS if r["seed"] == 0], "filtered", "raw")


def test_holms_method() -> None:
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparison.holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts_follow_the_rule() -> None:
    found = {v.name: v for v in comparison.verdicts(RUNS)}
    assert found["H1"].outcome == "not supported: no significant difference"
    assert found["H2"].outcome == "supported"
    assert (found["H2"].better, found["H2"].kinds) == (2, 2)
    worse = copy.deepcopy(RUNS)
    for run in worse:
        if run["arm"] == "books":
            run["held_out"] = {"essays": 4.0 + run["seed"] / 100, "Python": 12.0}
    assert {v.name: v for v in comparison.verdicts(worse)}["H2"].outcome.startswith("mixed")
    for run in worse:
        if run["arm"] == "books":
            run["held_out"] = {"essays": 14.0 + run["seed"] / 100, "Python": 12.0}
    assert {v.name: v for v in comparison.verdicts(worse)}["H2"].outcome.startswith("contradicted")


SUMMARY = {
    "arms": {
        arm: {
            "available": {"documents": 9, "bytes": 2_000_000},
            "contaminated": 1,
            "documents": 8,
            "bytes": 1_500_000,
            "tokens": 400_000,
        }
        for arm in VALUES
    },
    "filters": {"dropped": {"near duplicate": {"documents": 2, "bytes": 500_000}}, "accuracy": 0.9, "threshold": 0.5},
}


def test_the_page_keeps_all_but_the_results(tmp_path: Path) -> None:
    place = tmp_path / "docs.md"
    with pytest.raises(UsageError, match="add them"):
        place.write_text("no marks")
        page.write(place, RUNS, SUMMARY)
    place.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(place, RUNS, SUMMARY)
    text = place.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| H2: books − raw | -2.9000 [" in text
    assert "| essays | 9.0000 ± 0.0000 | 11.0000 ± 1.0000 | 6.1000 ± 0.1000 |" in text
    assert "| near duplicate | 2 | 500,000 (25.0%) |" in text
    assert "9 minutes" in text  # 9 runs of one step of a second and 59 seconds of judging
    assert (tmp_path / "plots" / "textbooks-own.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="run all seeds"):
        page.write(place, RUNS[:1], SUMMARY)


def test_plans_and_results_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    made = Corpora(tmp_path, SUMMARY)
    with pytest.raises(UsageError, match="at least 2048"):
        runs.Plan.of(2047, made)
    with pytest.raises(UsageError, match="holds 400,000, and no token is read twice"):
        runs.Plan.of(400_000, made)
    plan = runs.Plan.of(5000, made)
    assert plan.tokens == 4096
    results = runs.Results(tmp_path / "r.jsonl", plan)
    results.add({"arm": "raw", "seed": 1, "plan": {**vars(plan)}})
    again = runs.Results(tmp_path / "r.jsonl", plan)
    assert again.has("raw", 1)
    assert not again.has("raw", 2)
    with pytest.raises(UsageError, match="name another --work"):
        runs.Results(tmp_path / "r.jsonl", runs.Plan.of(2048, made))


def test_the_model_has_ten_million_parameters() -> None:
    assert 9.5e6 < runs.SHAPE.num_parameters() < 11e6


def test_a_default_run_fits_two_hours() -> None:
    assert textbooks.TOKENS * len(textbooks.SEEDS) * 3 / 7200 < 1500  # tokens per second, all else included

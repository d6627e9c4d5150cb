"""Scores: a classifier that is trained here, a published one in small, thresholds, and the page to choose one by."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curation_files import as_documents, log, parts, step, text, words, write_lines

from phi_fast.curate import main
from phi_fast.curation.classifier import Classifier, TrainingSettings, judge, train
from phi_fast.curation.documents import CurateError, Document
from phi_fast.curation.hub_classifier import HubScore
from phi_fast.curation.score_page import edges, page
from phi_fast.curation.score_samples import gather
from phi_fast.curation.threshold import Threshold

_TEACHERS = "therefore because example theorem proof exercise definition explain understand learn"
LESSON = _TEACHERS.split(" ")


def samples(count: int) -> list[tuple[str, int]]:
    """Texts whose share of a teacher's words is their label, 0 to 4."""
    made = []
    for i in range(count):
        label = i % 5
        rest = words(i, 40 - 4 * label)
        lesson = [LESSON[(i + k) % len(LESSON)] for k in range(4 * label)]
        made.append((" ".join(rest + lesson), label))
    return made


SMALL = TrainingSettings(dimensions=16, trees=30, good=3)


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, dict[str, Any]]:
    texts, labels = zip(*samples(400), strict=True)
    return train(texts, labels, SMALL)


def test_a_classifier_learns_what_the_labels_say(trained: tuple[Classifier, dict[str, Any]]) -> None:
    made, results = trained
    assert results["samples"] == 400 and results["held_out"] == 80
    assert results["rank_correlation"] > 0.8 and results["precision"] > 0.8 and results["recall"] > 0.8
    scores = made.score([" ".join(words(9, 40)), " ".join(LESSON * 4)])
    assert scores[0] < 1.5 and scores[1] > 3


def test_a_score_is_the_expected_label(trained: tuple[Classifier, dict[str, Any]]) -> None:
    """Of the forest's probabilities, which the trees' leaves give."""
    made, _ = trained
    sample = [text(5), " ".join(LESSON)]
    vectors = made._embed(sample)
    leaves = np.mean([tree.predict_proba(vectors) for tree in made._forest.estimators_], axis=0)
    assert made.score(sample) == pytest.approx(leaves @ np.array([0, 1, 2, 3, 4.0]))


def test_measures_are_those_of_hand_counts() -> None:
    found = judge(np.array([0.0, 3, 4, 2.9]), np.array([0.0, 3, 2, 4]), good=3)
    assert (found["precision"], found["recall"]) == (0.5, 0.5)
    assert found["mean_absolute_error"] == pytest.approx((0 + 0 + 2 + 1.1) / 4)
    assert found["rank_correlation"] == pytest.approx(0.2)  # 1 - 6·Σd² / (n³ - n), with d = 0, 0, 2, 2


def test_the_commands_train_score_look_and_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": one, "score": label, "id": f"d{i}"} for i, (one, label) in enumerate(samples(150))]
    write_lines(tmp_path / "labels.jsonl", [*lines, {"text": "no label"}])
    source, file = str(tmp_path / "labels.jsonl"), str(tmp_path / "x" / "c.skops")
    small = ["--dimensions", "8", "--trees", "10"]
    assert main(["train-classifier", source, "--out", file, *small]) == 1
    assert "'score' is 'None', expected a number; name it with --label" in capsys.readouterr().err
    assert main(["train-classifier", source, "--out", file, "--skip-malformed", *small]) == 0
    assert "left out 1 malformed" in capsys.readouterr().out
    assert main(["score", source, "--classifier", file, "--out", str(tmp_path / "s"), "--workers", "1"]) == 0
    kept = parts(tmp_path / "s")
    expected = Classifier.load(Path(file)).score([one["text"] for one in kept])
    assert [one["scores"]["education"] for one in kept] == pytest.approx(expected.tolist(), abs=1e-4)
    scored = [str(tmp_path / "s"), "--at-least", "2.5"]
    assert main(["page", *scored, "--out", str(tmp_path / "p.html")]) == 0
    assert main(["threshold", *scored, "--out", str(tmp_path / "t"), "--workers", "1"]) == 0
    above = [one["id"] for one in kept if one["scores"]["education"] >= 2.5]
    assert 0 < len(above) < 151 and [one["id"] for one in parts(tmp_path / "t")] == above
    assert f"<th>kept</th><td>{len(above)} (" in (tmp_path / "p.html").read_text("utf-8")


def test_files_that_are_no_classifier_are_refused(trained: tuple[Classifier, dict[str, Any]], tmp_path: Path) -> None:
    import pickle

    file = tmp_path / "c.skops"
    trained[0].save(file)
    whole = file.read_bytes()
    for name, data in {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "pickle": pickle.dumps({"format": 1}),
        "zip": _zipped({"schema.json": "{}"}),
    }.items():
        (tmp_path / f"{name}.skops").write_bytes(data)
        with pytest.raises(CurateError, match=f"{name}.skops is no classifier"):
            Classifier.load(tmp_path / f"{name}.skops")
    with pytest.raises(CurateError, match="cannot be read"):
        Classifier.load(tmp_path / "none.skops")
    from skops.io import dumps

    (tmp_path / "other.skops").write_bytes(dumps({"format": "another"}))
    with pytest.raises(CurateError, match="no classifier of this program"):
        Classifier.load(tmp_path / "other.skops")


@pytest.mark.parametrize("field", ["left_child", "right_child", "feature"])
def test_a_tree_that_leads_out_of_its_arrays_is_refused(field: str, tmp_path: Path) -> None:
    texts, labels = zip(*samples(60), strict=True)
    made, _ = train(texts, labels, TrainingSettings(dimensions=4, trees=2))
    tree = made._forest.estimators_[0].tree_
    state = tree.__getstate__()
    state["nodes"][field][0] = 10**6
    tree.__setstate__(state)
    made.save(tmp_path / "c.skops")
    with pytest.raises(CurateError, match="its trees do not fit together"):
        Classifier.load(tmp_path / "c.skops")


def _zipped(content: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return data.getvalue()


def test_too_few_or_equal_labels_are_refused() -> None:
    for labels in ([1.0] * 50, [0.0, 1.0]):
        with pytest.raises(CurateError, match="needs some hundred samples"):
            train([text(i, 12) for i in range(len(labels))], labels, SMALL)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of fineweb-edu's architecture: BERT with one output, and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("published")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LESSON, *"abcdefghij"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1,
        max_position_embeddings=32, classifier_dropout=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_published_classifier_gives_its_logit(published: Path) -> None:
    """One text at a time, as the model card computes it, against batches that are padded and in another order."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [" ".join(LESSON[: 1 + i % 9]) for i in range(40)] + ["", " ".join(LESSON * 50)]
    documents = as_documents(texts)
    assert HubScore(str(published), "edu").judge(documents) == [None] * 42
    tokenizer = AutoTokenizer.from_pretrained(published)
    model = AutoModelForSequenceClassification.from_pretrained(published).eval()
    with torch.inference_mode():
        expected = [
            model(**tokenizer(one, return_tensors="pt", truncation=True, max_length=32)).logits.item() for one in texts
        ]
    assert [one.scores["edu"] for one in documents] == pytest.approx(expected, abs=2e-4)
    assert len(set(expected)) > 5


def test_models_that_do_not_fit_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(CurateError, match="cannot be loaded"):
        HubScore(str(tmp_path), "edu")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoTokenizer.from_pretrained(published).save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(
        published, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    with pytest.raises(CurateError, match="has 3 outputs, expected 1"):
        HubScore(str(tmp_path), "edu")


def test_a_threshold_counts_what_has_no_score(tmp_path: Path) -> None:
    records = [{"text": "x", "id": str(i), "scores": {"s": value}} for i, value in enumerate((1.9, 2, 2.1))]
    source = write_lines(tmp_path / "a.jsonl", [*records, {"text": "none", "id": "3"}])
    report = step(Threshold("s", 2), source, tmp_path / "out", dropped_texts=True)
    assert [one["id"] for one in parts(tmp_path / "out")] == ["1", "2"]
    assert report.counts.dropped == {"no score s": 1, "s below 2": 1}
    assert [one["text"] for one in log(tmp_path / "out", "dropped")] == ["x", "none"]


def test_the_page_shows_counts_and_samples_of_both_sides() -> None:
    draw = np.random.default_rng(0)
    values = [round(float(value), 4) for value in draw.normal(2, 1, 500)]
    hostile = "<script>alert(1)</script> \u202e & 'quotes'"
    documents = [Document(f"{hostile} {i}", f"<b>{i}", {"s": value}) for i, value in enumerate(values)]
    scores = gather([*documents, Document("x", "y")], "s", 2.5, 3)
    ordered = sorted(values)
    below = [value for value in ordered if value < 2.5]
    assert [one.score for one in scores.nearest_below] == below[-3:]
    assert [one.score for one in scores.nearest_above] == ordered[len(below) : len(below) + 3]
    assert all(one.score < 2.5 for one in scores.any_below) and all(one.score >= 2.5 for one in scores.any_above)
    assert scores.missing == 1 and len(scores.values) == 500
    html = page(scores, "a & b")
    bars = [(part[0], int(part[1])) for part in re.findall(r'<rect class="(\w+)"[^>]*><title>[^:]*: (\d+)<', html)]
    assert sum(count for side, count in bars if side == "below") == len(below)
    assert sum(count for side, count in bars if side == "above") == 500 - len(below)
    assert "<script" not in html and "\u202e" not in html and "<b>" not in html
    assert html.count("<details>") == 12
    again = gather(reversed(documents), "s", 2.5, 3)
    assert [one.id for one in again.any_above] == [one.id for one in scores.any_above]


@pytest.mark.parametrize("values", [[], [2.0], [1e30, -1e30], [0.0, 1e-12]])
def test_bins_hold_every_score_and_border_on_the_threshold(values: list[float]) -> None:
    scores = gather([Document("x", str(i), {"s": value}) for i, value in enumerate(values)], "s", 2.0, 2)
    bounds = edges(scores)
    assert np.isclose(bounds, 2.0, atol=1e-6 * max(1, *map(abs, values or [0]))).any()
    assert np.histogram(scores.values.astype(np.float64), bounds)[0].sum() == len(values)
    json.dumps(page(scores, "x"))

"""Marks beside the tokens: the labels that are trained, where documents begin, and rows read as they were packed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from token_files import DELIMITER, draw_tokens, write_corpus, write_marked

from phi_fast._C import tokens
from phi_fast.data import FormatError, Mixture, TokenLoader, sequential_rows
from phi_fast.data.manifest import Manifest, ManifestError
from phi_fast.data.store import CorpusError, isolated_rows

LENGTH, ROWS = 37, 50
TRAINED, BEGINS = 1, 2


def draw_marks(count: int) -> np.ndarray:
    """Marks of all four kinds, where each row begins a document."""
    marks = np.random.default_rng(3).integers(0, 4, count)
    marks[::LENGTH] = BEGINS
    return marks


def expected_row(ids: np.ndarray, marks: np.ndarray, row: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """(input ids, labels, positions, places where documents begin), token by token."""
    at = range(row * LENGTH, (row + 1) * LENGTH)
    labels = [int(ids[i + 1]) if marks[i + 1] & TRAINED else -100 for i in at]
    begins = [i - at[0] for i in at if i == at[0] or marks[i] & BEGINS]
    positions = [i - max(b for b in begins if b <= i) for i in range(LENGTH)]
    return [int(ids[i]) for i in at], labels, positions, begins


@pytest.fixture(params=["uint16", "uint32"])
def corpus(request, tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    ids = draw_tokens(LENGTH * ROWS + 1)
    marks = draw_marks(len(ids))
    return write_marked(tmp_path / "chat", ids, marks, LENGTH, request.param), ids, marks


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("threads", [0, 2])
def test_an_epoch_has_every_packed_row_once_with_its_marks(corpus, mode, threads):
    path, ids, marks = corpus
    seen = []
    with TokenLoader(
        Mixture.of({"chat": (path, 1)}), LENGTH, 5, mode=mode, threads=threads, document_isolation=True
    ) as loader:
        for _ in range(ROWS // 5):
            batch = next(loader)
            cuts = batch.cu_seqlens.tolist()
            trained = 0
            for i, number in enumerate(batch.rows):
                row = loader.store.place(number).row
                inputs, labels, positions, begins = expected_row(ids, marks, row)
                assert batch.input_ids[i].tolist() == inputs
                assert batch.labels[i].tolist() == labels
                assert batch.positions[i].tolist() == positions
                assert [cut - i * LENGTH for cut in cuts if i * LENGTH <= cut < (i + 1) * LENGTH] == begins
                trained += sum(label != -100 for label in labels)
                seen.append(row)
            assert cuts[-1] == 5 * LENGTH
            assert batch.trained == trained
    assert sorted(seen) == list(range(ROWS))


def test_marked_and_other_corpora_mix(corpus, tmp_path):
    """Rows without marks train every label, and their documents begin at delimiters."""
    path, ids, marks = corpus
    others = draw_tokens(3000, seed=1, documents=100)
    plain = write_corpus(tmp_path / "plain", others)
    mixture = Mixture.of({"chat": (path, 1), "plain": (plain, 1)})
    with TokenLoader(mixture, LENGTH, 8, document_isolation=True) as loader:
        batch = next(loader)
        assert set(batch.components.tolist()) == {0, 1}
        for i, number in enumerate(batch.rows):
            place = loader.store.place(number)
            if place.corpus == "chat":
                assert batch.labels[i].tolist() == expected_row(ids, marks, place.row)[1]
            else:
                assert batch.labels[i].tolist() == others[place.token + 1 : place.token + 1 + LENGTH].tolist()
                begins = (batch.positions[i] == 0).nonzero().flatten().tolist()
                row = others[place.token : place.token + LENGTH]
                assert begins == sorted({0, *np.flatnonzero(row == DELIMITER).tolist()})
        assert batch.trained == int((batch.labels != -100).sum())
    with TokenLoader(Mixture.of({"plain": (plain, 1)}), LENGTH, 8) as loader:
        assert next(loader).trained is None


def test_validation_rows_have_the_loaders_labels_and_documents(corpus):
    path, ids, marks = corpus
    rows = list(isolated_rows(path, "train", LENGTH, batch=4, start=0, stop=ROWS, max_token_id=DELIMITER))
    plain = list(sequential_rows(path, "train", LENGTH, batch=4))
    for first, (input_ids, labels, cuts), joined in zip(range(0, ROWS, 4), rows, plain, strict=True):
        assert torch.equal(input_ids, joined[0])
        assert torch.equal(labels, joined[1])
        places = []
        for i in range(len(input_ids)):
            expected = expected_row(ids, marks, first + i)
            assert (input_ids[i].tolist(), labels[i].tolist()) == expected[:2]
            places += [i * LENGTH + begin for begin in expected[3]]
        assert cuts.tolist() == [*places, input_ids.numel()]


def test_rows_of_another_length_are_refused(corpus):
    path, *_ = corpus
    with pytest.raises(FormatError, match=f"rows of {LENGTH} tokens, and sequence_length is 20: use --sequence-length"):
        TokenLoader(Mixture.of({"chat": (path, 1)}), 20, 2)
    with pytest.raises(FormatError, match=f"rows of {LENGTH} tokens"):
        next(sequential_rows(path, "train", 20))


def test_marks_changed_while_in_use_are_an_error(corpus):
    path, _, marks = corpus
    with TokenLoader(Mixture.of({"chat": (path, 1)}), LENGTH, 2, threads=0, mode="pread") as loader:
        next(loader)
        file = path / "train.marks"
        os.utime(file, ns=(1, 1))
        next(loader)  # touched, with the same content
        file.write_bytes((marks ^ TRAINED).astype("u1").tobytes())
        with pytest.raises(CorpusError, match=r"train\.marks was changed while in use"):
            next(loader)


def test_a_manifest_says_what_is_wrong_with_marks(corpus):
    path, ids, _ = corpus
    manifest = Manifest.read(path)
    assert json.loads((path / "manifest.json").read_text())["version"] == 2
    split = manifest.splits["train"]
    with_marks = manifest.fingerprint("train")
    for change in ({"marks_sha256": ("0" * 64,)}, {"row_tokens": 1}, {"marks": None, "marks_sha256": ()}):
        other = replace(manifest, splits={"train": replace(split, **change)})
        assert other.fingerprint("train") != with_marks
    replace(manifest, splits={"train": replace(split, row_tokens=LENGTH + 1)}).write(path)
    with pytest.raises(ManifestError, match=f"expected rows of {LENGTH + 1} and one more token"):
        Manifest.read(path)
    manifest.write(path)
    damaged = bytearray((path / "train.marks").read_bytes())
    damaged[7] ^= TRAINED
    (path / "train.marks").write_bytes(damaged)
    with pytest.raises(ManifestError, match=r"train\.marks: block 0 does not have the manifest's sha256"):
        Manifest.read(path).verify(path)
    (path / "train.marks").write_bytes(damaged[:-1])
    with pytest.raises(ManifestError, match=f"{len(ids) - 1} bytes, and {len(ids)} marks take"):
        Manifest.read(path)
    replace(manifest, splits={"train": replace(split, marks="../outside")}).write(path)
    with pytest.raises(ManifestError, match="is outside"):
        Manifest.read(path)


def test_a_corpus_without_marks_is_written_as_before(tmp_path):
    write_corpus(tmp_path, draw_tokens(100))
    document = json.loads((tmp_path / "manifest.json").read_text())
    assert document["version"] == 1
    assert not {"marks", "marks_sha256", "row_tokens"} & document["splits"]["train"].keys()


def test_the_c_entries_refuse_marks_that_do_not_fit(tmp_path):
    path = write_marked(tmp_path, draw_tokens(LENGTH * 2 + 1), draw_marks(LENGTH * 2 + 1), LENGTH)
    order = tokens.Order([(1, LENGTH * 2 + 1)], [(0, [1])], LENGTH, 0, [True])
    assert order.rows(0) == 2
    file = tokens.TokenFile(str(path / "train.bin"), 2, 0, LENGTH * 2 + 1, False)
    marks = tokens.TokenFile(str(path / "train.marks"), 1, 0, LENGTH * 2 + 1, False)
    short = tokens.TokenFile(str(path / "train.marks"), 1, 0, LENGTH, False)
    tokens.Reader([file], order, 2**31, [-1], [marks])
    for wrong in ([short], [file], [marks, marks]):
        with pytest.raises(ValueError, match=r"marks|does not have one byte"):
            tokens.Reader([file], order, 2**31, [-1], wrong)
    with pytest.raises(ValueError, match="holds no tokens"):
        tokens.Reader([marks], order, 2**31, [-1])
    with pytest.raises(ValueError, match="packed"):
        tokens.Order([(1, LENGTH * 2 + 1)], [(0, [1])], LENGTH, 0, [True, False])

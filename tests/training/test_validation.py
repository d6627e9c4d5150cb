"""The validation loss in bits per byte: of each corpus, of the mixture, and on several ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from trainer_processes import arguments, finish

from phi_fast.training.validation import Validation


def tokens_of(corpus: Path) -> np.ndarray:
    """Read the validation tokens: in the tests' corpora each is one byte, but the delimiter, which has id 0."""
    return np.fromfile(corpus / "validation.bin", "<u2")


@pytest.mark.parametrize("ranks", [1, 2])
def test_bits_per_byte_are_the_losses_over_the_bytes_of_the_rows(data: Path, tmp_path: Path, ranks: int) -> None:
    """One row of each corpus, as long as the first document: its last label is the delimiter, and no input is one."""
    length = int((tokens_of(data / "docs") == 0).argmax())
    words = arguments(data, tmp_path / "run", 3, val_every=2, val_rows=1, mixture="docs=3,code=1")
    words += ["--sequence-length", str(length), "--tokens", str(3 * 4 * length)]
    output = finish(words, tmp_path, ranks=ranks)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in measured] == [0, 2, 3]
    nats, size = 0.0, 0.0
    for record in measured:
        for name, weight in (("docs", 3), ("code", 1)):
            labels = length
            text = int((tokens_of(data / name)[1 : labels + 1] != 0).sum())
            assert text < labels or name == "code"
            loss = record["val_losses"][name]
            assert record["val_bpbs"][name] == pytest.approx(loss * labels / text / math.log(2), rel=1e-6)
            nats, size = nats + weight * loss * labels, size + weight * text
        assert record["val_bpb"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
        nats, size = 0.0, 0.0
    assert all("val_bpb" not in record for record in records if "val_loss" not in record)
    assert f"{measured[-1]['val_bpb']:.4f} bits per byte" in output
    assert f"{measured[1]['val_bpb']:.4f} bits/byte" in output


def test_rows_without_text_have_no_bits_per_byte() -> None:
    found = Validation({"docs": 2.0, "code": 4.0}, {"docs": 0.0, "code": 2.0})
    assert found.fields({"docs": 1}) == {
        "val_loss": 2.0,
        "val_losses": {"docs": 2.0, "code": 4.0},
        "val_bpb": None,
        "val_bpbs": {"docs": None, "code": pytest.approx(2 / math.log(2))},
    }
    assert found.fields({"docs": 1, "code": 1, "absent": 5})["val_bpb"] == pytest.approx(3 / math.log(2))

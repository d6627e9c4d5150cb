"""datatrove's rules as steps: what they refuse, what they change, and a language model of one's own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from curation_files import as_documents, files, parts, step, write_lines

from phi_fast.curation.documents import CurateError
from phi_fast.curation.rules import EMAIL, IP, Rules, RuleSettings

_RIVER = "the river runs to the sea and people of that town have walked along it with their children every day"
_FLEUVE = "le fleuve coule vers la mer et les gens de cette ville marchent avec leurs enfants tous les jours"
ENGLISH, FRENCH = _RIVER.split(" "), _FLEUVE.split(" ")


def prose(vocabulary: list[str], seed: int, sentences: int = 12) -> str:
    draw = random.Random(seed)
    lines = []
    for i in range(sentences):
        words = draw.sample(vocabulary, 11)
        lines.append(f"{' '.join(words).capitalize()} number{seed}x{i}.")
    return "\n".join(lines)


def test_quality_and_repetition_are_datatroves(tmp_path: Path) -> None:
    good, short = prose(ENGLISH, 1), "Too short."
    repeated = "\n".join(["The same line with the same words of the day."] * 30)
    symbols = prose(ENGLISH, 2).replace(" ", " # ")
    source = write_lines(tmp_path / "a.jsonl", [{"text": one} for one in (good, short, repeated, symbols, " \n")])
    report = step(Rules(RuleSettings(("gopher-quality", "gopher-repetition"))), source, tmp_path / "out")
    assert [one["text"] for one in parts(tmp_path / "out")] == [good]
    assert report.counts.dropped == {
        "gopher-quality: gopher_short_doc": 1,
        "gopher-quality: gopher_too_many_hashes": 1,
        "gopher-repetition: dup_line_frac": 1,
        "gopher-quality: no text": 1,
    }


def test_c4_and_pii_change_texts(tmp_path: Path) -> None:
    clean = prose(ENGLISH, 1)
    texts = [f"{clean}\nmenu\nEnable javascript to see the rest of it.", f"{clean}\nWrite to a.b@c.org or 8.8.8.8 now."]
    texts.append(f"{clean}\nHome is 127.0.0.1 here now.")
    source = write_lines(tmp_path / "a.jsonl", [{"text": one} for one in texts])
    report = step(Rules(RuleSettings(("c4", "pii"))), source, tmp_path / "out")
    assert [one["text"] for one in parts(tmp_path / "out")] == [
        clean,
        f"{clean}\nWrite to {EMAIL} or {IP} now.",
        texts[2],
    ]
    assert report.counts.changed == 2


def test_a_documents_replacements_do_not_depend_on_others() -> None:
    made = Rules(RuleSettings(("pii",)))
    documents = as_documents(["x@y.org and 1.1.1.1"] * 9)
    made.judge(documents)
    assert len({one.text for one in documents}) == 1


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of fastText that knows two languages."""
    import fasttext

    folder = tmp_path_factory.mktemp("languages")
    lines = []
    for i in range(200):
        for name, vocabulary in (("en", ENGLISH), ("fr", FRENCH)):
            one = prose(vocabulary, i, 2).replace("\n", " ")
            lines.append(f"__label__{name} {one}\n")
    (folder / "train.txt").write_text("".join(lines))
    model = fasttext.train_supervised(str(folder / "train.txt"), dim=16, epoch=20, thread=1, verbose=0)
    model.save_model(str(folder / "lid.bin"))
    return folder / "lid.bin"


def test_languages_are_kept_by_name(tmp_path: Path, languages: Path) -> None:
    texts = [prose(ENGLISH, 900), prose(FRENCH, 901)]
    source = write_lines(tmp_path / "a.jsonl", [{"text": one, "id": str(i)} for i, one in enumerate(texts)])
    for keep, expected in (("en", "0"), ("fr", "1")):
        made = Rules(RuleSettings(("language",), languages=(keep,), language_model=languages))
        report = step(made, source, tmp_path / keep)
        [kept] = parts(tmp_path / keep)
        assert kept["id"] == expected and kept["scores"][f"language_{keep}"] > 0.65
        assert report.counts.dropped == {"language: refused": 1}


def test_workers_make_the_filters_anew(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"mail {i}@x.org"} for i in range(20)])
    for workers in (1, 2):
        step(Rules(RuleSettings(("pii",))), source, tmp_path / str(workers), workers=workers, shard_bytes=100)
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rules": ()}, "name the rules"),
        ({"rules": ("gopher",)}, "no rule 'gopher': choose from gopher-quality"),
        ({"rules": ("pii", "pii")}, "each can be given once"),
        ({"rules": ("language",), "languages": ()}, "name at least one"),
        ({"rules": ("language",), "language_model": Path("none.bin")}, "none.bin is not a file"),
        ({"rules": ("pii",), "language_threshold": 1}, "language_threshold=1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(CurateError, match=message):
        Rules(RuleSettings(**bad))  # type: ignore[arg-type]

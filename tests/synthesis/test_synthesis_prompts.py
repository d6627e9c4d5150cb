"""The order and the wording of prompts, and what they are read from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from phi_fast.errors import UsageError
from phi_fast.synthesis.prompts import AUDIENCES, EXTRACT_CHARACTERS, STYLES, Prompts
from phi_fast.synthesis.sources import read_pages, read_topics

TOPICS = [f"topic {i}" for i in range(40)]


def test_every_combination_comes_once_per_repeat() -> None:
    prompts = Prompts(TOPICS, repeats=2)
    assert len(prompts) == 40 * 4 * 6 * 2 == len(list(prompts))
    counts = Counter((prompt.topic, prompt.audience, prompt.style, prompt.repeat) for prompt in prompts)
    assert set(counts.values()) == {1}
    assert {key[1] for key in counts} == set(AUDIENCES)
    assert {key[2] for key in counts} == set(STYLES)
    assert [prompt.number for prompt in prompts] == list(range(len(prompts)))
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    assert all(0 <= prompt.seed < 2**31 for prompt in prompts)


def test_the_order_is_that_of_its_seed_and_mixes_everything() -> None:
    """A first tenth has each style about as often as any other; another seed gives another order."""
    prompts = Prompts(TOPICS)
    assert list(prompts) == list(Prompts(list(TOPICS)))
    first = [prompts[i] for i in range(96)]
    for names in (Counter(prompt.style for prompt in first), Counter(prompt.audience for prompt in first)):
        assert min(names.values()) > 96 / len(names) / 3
    assert len({prompt.topic for prompt in first}) > 30
    other = Prompts(TOPICS, seed=1)
    assert [prompt.text for prompt in other] != [prompt.text for prompt in prompts]
    assert prompts[0].seed != other[0].seed


def test_this_order_stays_what_it_is() -> None:
    """A run that was begun with an earlier version is resumed with the same prompts."""
    first = [(prompt.topic, prompt.audience, prompt.style) for prompt in list(Prompts(TOPICS))[:3]]
    assert first == [
        ("topic 11", "researchers", "dialogue"),
        ("topic 10", "high_school_students", "dialogue"),
        ("topic 32", "college_students", "blog_post"),
    ]


def test_the_text_names_topic_audience_and_style() -> None:
    for prompt in Prompts(["{braces} and 100%"]):
        assert '"{braces} and 100%"' in prompt.text
        assert AUDIENCES[prompt.audience] in prompt.text
        assert STYLES[prompt.style].partition("{about}")[0] in prompt.text
    assert len({prompt.text for prompt in Prompts(["one"])}) == 24


def test_each_page_is_quoted_before_any_is_quoted_again() -> None:
    pages = [f"page {i} " + "x" * 3000 for i in range(10)]
    prompts = Prompts(TOPICS[:2], extracts=pages)
    numbers = [prompt.extract for prompt in prompts]
    assert sorted(numbers[:10]) == sorted(numbers[10:20]) == list(range(10))
    assert numbers[:10] != list(range(10))
    for prompt in prompts:
        assert f'"{pages[prompt.extract][:EXTRACT_CHARACTERS]}"' in prompt.text
        assert "x" * EXTRACT_CHARACTERS not in prompt.text
        assert prompt.labels["extract"] == prompt.extract


def test_what_identifies_prompts() -> None:
    plain = Prompts(["a", "b"]).identity()
    changed = {
        "topics": Prompts(["a", "bb"]),
        "pages": Prompts(["a", "b"], extracts=["x"]),
        "repeats": Prompts(["a", "b"], repeats=2),
        "seed": Prompts(["a", "b"], seed=1),
    }
    for name, other in changed.items():
        assert [key for key, value in other.identity().items() if value != plain[key]] == [name]
    assert Prompts(["ab", "c"]).identity() != Prompts(["a", "bc"]).identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topics": []}, "no topics"),
        ({"audiences": ("adults",)}, "--audiences adults: expected some of young_children"),
        ({"styles": ("story", "story")}, "each only once"),
        ({"styles": ()}, "at least one name"),
        ({"repeats": 0}, "--repeats 0"),
        ({"seed": -1}, "--seed -1"),
        ({"repeats": 2**31}, "expected fewer than"),
    ],
)
def test_prompts_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prompts(**{"topics": ["a"], **fields})


def test_topics_and_pages_are_read(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_bytes("\ufefftides\r\n\n  prime   numbers \ntides\n".encode())
    assert read_topics(tmp_path / "topics.txt") == ["tides", "prime numbers"]
    (tmp_path / "topics.jsonl").write_text('{"topic": "tides"}\n{"topic": "bread", "x": 1}\n')
    assert read_topics(tmp_path / "topics.jsonl") == ["tides", "bread"]
    (tmp_path / "pages.jsonl").write_text('{"content": "one"}\n{"content": " "}\n')
    assert read_pages(tmp_path / "pages.jsonl", "content") == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b" \n\n", "has no topics"),
        ("t.txt", b"a\nb\xff\n", r"t\.txt:2 is not UTF-8"),
        ("t.jsonl", b'{"topic": 1}\n', r"t\.jsonl:1: topic is 1, expected a string"),
        ("t.jsonl", b'{"topic": "a"}\nno\n', r"t\.jsonl:2 is not JSON"),
        ("t.jsonl", b'{"topic": "\\ud800"}\n', "half a surrogate pair"),
    ],
)
def test_files_of_topics_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_topics(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_topics(tmp_path / "absent.txt")

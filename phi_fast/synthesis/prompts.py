"""Prompts for synthetic textbooks: topics × audiences × styles, each with an extract of a web page if there are any.

phi-1.5 (arXiv 2309.05463, section 2.2) was trained on text about 20,000 topics, with samples of web data in the prompts
for diversity. Cosmopedia (Hugging Face, 2024) publishes the method in full: the same topic is asked for in several
styles and for several audiences, so that two texts about it share little. The wording of the prompts is this project's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.preparation.units import shuffle_keys
from ..errors import UsageError

AUDIENCES = {
    "young_children": (
        "young children of five to eight years. Use short sentences and everyday words, explain every new word, and "
        "begin each idea with something that a child has seen or done"
    ),
    "high_school_students": (
        "high school students. Introduce every term before you use it, connect the ideas to what is taught in earlier "
        "years, and work through at least one example step by step"
    ),
    "college_students": (
        "college students of the subject. Be rigorous: define terms, derive results where they can be derived, and "
        "illustrate them with specific cases, dates or calculations"
    ),
    "researchers": (
        "researchers in the field. Assume the basics, discuss methods and their limits, and say which questions are "
        "open and why"
    ),
}
"""Name -> whom the text is for, and what that asks of it."""

STYLES = {
    "textbook": (
        "Write a section of a textbook {about}. Develop each idea in full before the next one, in paragraphs and not "
        "in lists. Begin with the content itself: no title, no greeting, no summary of what will follow"
    ),
    "blog_post": (
        "Write a blog post {about}. Take one point of view on the subject and follow it with examples and reasons, in "
        "a conversational tone. Give no title, and do not begin with a question to the reader"
    ),
    "wikihow": (
        "Write a tutorial in numbered steps, like an article of WikiHow, {about}. Explain in each step what to do, why "
        "it helps and what commonly goes wrong"
    ),
    "story": (
        "Write a story {about}. Its people need the subject to solve a problem, and the reader learns it through what "
        "they say and do. Let it have a beginning, a turn and an end"
    ),
    "dialogue": (
        "Write a dialogue between a teacher and a learner {about}. The learner asks, misunderstands at least once, and "
        "is led to see why"
    ),
    "exercises": (
        "Write three exercises of increasing difficulty {about}, each with the reasoning that leads to its answer, "
        "step by step, and the answer itself"
    ),
}
"""Name -> what to write; {about} is replaced by the subject."""

EXTRACT_CHARACTERS = 1000
"""Maximum length of the extract of a web page in a prompt, as in Cosmopedia."""


@dataclass(frozen=True)
class Prompt:
    """One request to the model."""

    number: int
    """Place in the order of all prompts, counted from 0."""
    text: str
    topic: str
    audience: str
    style: str
    repeat: int
    """How many prompts for the same topic, audience and style have a smaller `repeat`."""
    seed: int
    """Random seed for the server's sampling, 0 to below 2^31."""
    extract: int | None = None
    """Which of the web pages the prompt quotes; None for none."""

    @property
    def labels(self) -> dict[str, Any]:
        """Fields that are written beside the text."""
        labels = {"topic": self.topic, "audience": self.audience, "style": self.style, "repeat": self.repeat}
        return labels if self.extract is None else {**labels, "extract": self.extract}


@dataclass(frozen=True)
class Prompts:
    """Every combination of topic, audience and style, `repeats` times, in an order that depends only on these fields.

    The order is a permutation of all combinations, so that any first part of it covers topics, audiences and styles
    evenly. Raises UsageError for an unknown audience or style, for no topics, and for fewer than one repeat.
    """

    topics: Sequence[str]
    audiences: Sequence[str] = tuple(AUDIENCES)
    styles: Sequence[str] = tuple(STYLES)
    extracts: Sequence[str] = ()
    """Texts of web pages. Each prompt quotes the beginning of one of them; none is used twice before all were used."""
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for option, names, known in (("--audiences", self.audiences, AUDIENCES), ("--styles", self.styles, STYLES)):
            for name in names:
                if name not in known:
                    raise UsageError(f"{option} {name}: expected some of {', '.join(known)}")
            if not names or len(set(names)) < len(names):
                raise UsageError(f"{option} {' '.join(names)}: expected at least one name, and each only once")
        if not self.topics:
            raise UsageError("there are no topics: give a file with one topic on each line")
        if self.repeats < 1:
            raise UsageError(f"--repeats {self.repeats}: expected at least 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: expected 0 to below 2**64")
        if len(self) >= 2**32:
            raise UsageError(
                f"{len(self.topics):,} topics give {len(self):,} prompts, expected fewer than 2**32: divide the topics"
            )

    def __len__(self) -> int:
        return len(self.topics) * len(self.audiences) * len(self.styles) * self.repeats

    def __getitem__(self, number: int) -> Prompt:
        """The prompt at a place in the order. Raises IndexError at the end."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        rest, style = divmod(int(self._order[number]), len(self.styles))
        rest, audience = divmod(rest, len(self.audiences))
        repeat, topic = divmod(rest, len(self.topics))
        extract = int(self._pages[number % len(self.extracts)]) if self.extracts else None
        names = self.topics[topic], self.audiences[audience], self.styles[style]
        text = prompt_text(*names, None if extract is None else self.extracts[extract])
        hashed = hashlib.blake2b(f"{self.seed} {number}".encode(), digest_size=4).digest()
        return Prompt(number, text, *names, repeat, int.from_bytes(hashed, "little") >> 1, extract)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the prompts, for the comparison of two of them; long texts by their hash."""
        wording = [*(AUDIENCES[name] for name in self.audiences), *(STYLES[name] for name in self.styles)]
        frame = prompt_text("", self.audiences[0], self.styles[0], "x" * (EXTRACT_CHARACTERS + 1))
        return {
            "topics": _digest(self.topics),
            "pages": _digest(self.extracts),
            "audiences": list(self.audiences),
            "styles": list(self.styles),
            "repeats": self.repeats,
            "seed": self.seed,
            "wording": _digest([*wording, frame]),
        }

    @cached_property
    def _order(self) -> np.ndarray[Any, Any]:
        """(prompts,) int64: the combination at each place."""
        return np.argsort(shuffle_keys(0, len(self), self.seed), kind="stable")

    @cached_property
    def _pages(self) -> np.ndarray[Any, Any]:
        """(extracts,) int64: the order in which pages are quoted."""
        return np.argsort(shuffle_keys(1, len(self.extracts), self.seed), kind="stable")


def prompt_text(topic: str, audience: str, style: str, page: str | None = None) -> str:
    """The text of a prompt; of a page its first `EXTRACT_CHARACTERS` characters are quoted."""
    about = f'about "{topic}"'
    if page is not None:
        about += ", taking up what the extract suggests without repeating it"
    task = f"{STYLES[style].format(about=about)}.\n\nThe text is for {AUDIENCES[audience]}."
    if page is None:
        return task
    return f'Here is an extract of a web page:\n\n"{page[:EXTRACT_CHARACTERS].strip()}"\n\n{task}'


def _digest(texts: Sequence[str]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for text in texts:
        hashed.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()

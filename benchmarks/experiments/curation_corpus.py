"""A corpus with known duplicates, contamination and malformed records, from Python's documentation and library."""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import zstandard

NGRAM = 5
"""Words in a row by whose sets the similarity of planted near duplicates is computed exactly."""


@dataclass
class Planted:
    """Planted duplicates and contaminations, by document id."""

    exact: dict[str, str] = field(default_factory=dict)
    """Exact duplicate -> original."""
    near: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Near duplicate -> (original, exact Jaccard similarity of their word 5-grams)."""
    texts: list[str] = field(default_factory=list)
    """Documents with a text of the benchmark."""
    programs: list[str] = field(default_factory=list)
    """Documents with a function of the benchmark, renamed and without its docstring."""
    malformed: int = 0
    documents: int = 0
    """All well-formed ones."""
    bytes: int = 0
    """Bytes of text in UTF-8."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Planted:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Planted(**{**fields, "near": {name: tuple(pair) for name, pair in fields["near"].items()}})


def grams(text: str) -> set[tuple[str, ...]]:
    """List the word 5-grams of a text."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def jaccard(a: str, b: str) -> float:
    """Compute the similarity of two texts."""
    one, other = grams(a), grams(b)
    return len(one & other) / max(len(one | other), 1)


def make(folder: Path, megabytes: float, seed: int) -> Planted:
    """Write corpus.jsonl.zst, benchmark.jsonl and planted.json into `folder`, unless planted.json is there.

    Prose is drawn word by word with the frequencies of Python's documentation; every tenth document holds one function
    of the standard library. Near duplicates have some words replaced at random places.
    """
    record = folder / "planted.json"
    if record.exists():
        return Planted.read(record)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    prose = _Prose(draw)
    functions = list(_functions())
    draw.shuffle(functions)
    known, functions = functions[:100], functions[100:]
    questions = [prose.sentence(25) for _ in range(100)]
    with (folder / "benchmark.jsonl").open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(json.dumps({"question": question, "answer": str(draw.randrange(1000))}) + "\n")
        for function in known:
            head, _, body = function.partition("\n")
            file.write(json.dumps({"prompt": head + "\n", "canonical_solution": body}) + "\n")
    planted = Planted()
    waiting = {"texts": list(questions), "programs": [_renamed(function) for function in known]}
    with zstandard.open(folder / "corpus.jsonl.zst", "wt", encoding="utf-8") as out:
        for name, text in _documents(draw, prose, functions, waiting, planted, megabytes * 1e6):
            out.write(json.dumps({"text": text, "id": name}) + "\n")
            planted.documents += 1
            planted.bytes += len(text.encode())
            if draw.random() < 0.001:
                out.write(draw.choice(['{"text": ', '{"body": "x"}', '{"text": "\\ud800"}', "[]"]) + "\n")
                planted.malformed += 1
    planted.write(record)
    return planted


def _documents(
    draw: random.Random,
    prose: _Prose,
    functions: list[str],
    waiting: dict[str, list[str]],
    planted: Planted,
    size: float,
) -> Iterator[tuple[str, str]]:
    """Yield (id, text), duplicates up to 2,000 documents after their originals."""
    recent: list[tuple[str, str]] = []
    share = 200 / (size / 3500)
    number = 0
    while planted.bytes < size or any(waiting.values()):
        name, kind = f"d{number}", draw.random()
        number += 1
        if recent and kind < 0.02:
            original, text = draw.choice(recent)
            planted.exact[name] = original
            yield name, text.upper().replace(" ", "  ")
            continue
        if recent and kind < 0.07:
            original, text = draw.choice(recent)
            changed = prose.edited(text, draw.uniform(0.002, 0.12))
            planted.near[name] = (original, jaccard(text, changed))
            yield name, changed
            continue
        text = prose.document()
        if functions and draw.random() < 0.1:
            text += f"\n\n```python\n{functions.pop()}\n```\n"
        for part in ("texts", "programs"):
            if waiting[part] and (draw.random() < share / 2 or planted.bytes >= size):
                added = waiting[part].pop()
                text += f"\n\n{added}\n\n" if part == "texts" else f"\n\n```python\n{added}\n```\n"
                text += prose.sentence(30)
                getattr(planted, part).append(name)
                break
        else:
            recent.append((name, text))
            del recent[:-2000]
        yield name, text


class _Prose:
    """Sentences with the words of Python's documentation, as often as they are there."""

    def __init__(self, draw: random.Random) -> None:
        from pydoc_data.topics import topics

        counts = Counter(re.findall(r"[A-Za-z]+", " ".join(topics.values())))
        self._draw, self._words, self._weights = draw, list(counts), list(counts.values())

    def words(self, count: int) -> list[str]:
        return self._draw.choices(self._words, self._weights, k=count)

    def sentence(self, count: int) -> str:
        return f"{' '.join(self.words(count)).capitalize()}."

    def document(self) -> str:
        count = min(max(int(self._draw.lognormvariate(3.2, 0.8)), 4), 600)
        lines = [self.sentence(self._draw.randint(8, 25)) for _ in range(count)]
        return "\n".join(" ".join(lines[i : i + 5]) for i in range(0, count, 5))

    def edited(self, text: str, share: float) -> str:
        parts = text.split(" ")
        for place in self._draw.sample(range(len(parts)), max(1, round(share * len(parts)))):
            parts[place] = self.words(1)[0]
        return " ".join(parts)


def _functions() -> Iterator[str]:
    """Yield functions of the standard library with 8 to 60 lines besides their docstrings, different in syntax."""
    seen = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                continue
            bare = _renamed(ast.unparse(node))
            shape = re.sub(r"'[^']*'", "", bare)
            if 8 <= len(bare.splitlines()) <= 60 and shape not in seen:
                seen.add(shape)
                yield ast.unparse(node)


def _renamed(source: str) -> str:
    """Rename a function's variables and drop its docstring, as a rewritten solution would."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = f"my_{node.id}"
        elif isinstance(node, ast.arg):
            node.arg = f"my_{node.arg}"
        elif isinstance(node, ast.FunctionDef):
            node.name = f"own_{node.name}"
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                node.body = node.body[1:]
    return ast.unparse(tree)

"""Programs compared by their syntax: names, constants, comments and docstrings do not count (phi-1, section 5.2).

The paper computes "the (string) edit distance between the abstract syntax trees of two given code snippets" and drops
pairs with a match rate of at least τ, for τ from 0.95 to 0.8; it does not say how a tree is written, nor how the
distance becomes a rate. Here a tree is the sequence of its nodes' types in the order of a depth-first walk, with
operators, and the rate is 1 - distance / length of the longer sequence, both by rapidfuzz."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .benchmarks import parse

_FENCE = re.compile(r"^```[ \t]*(?:python|py|python3)[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]", re.MULTILINE)
_SKIPPED = {"annotation", "returns", "type_comment", "type_params", "ctx", "type_ignores"}
"""Fields that do not count."""
_KINDS = [kind for _, kind in sorted(vars(ast).items()) if isinstance(kind, type) and issubclass(kind, ast.AST)]
_FORM = {
    kind: (chr(0x100 + i), [name for name in kind._fields if name not in _SKIPPED]) for i, kind in enumerate(_KINDS)
}
"""Type of a node -> the character that stands for it, and its fields that count."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """One function of a program."""

    name: str
    source: str
    shape: str
    """One character for each node of its tree."""


def functions(text: str, least_nodes: int) -> Iterator[Function]:
    """Find the functions of a text with at least so many nodes: it is Python, or holds Python in ``` fences."""
    if not _DEFINITION.search(text):
        return
    sources = [match[1] for match in _FENCE.finditer(text)] or [text]
    for source in sources:
        tree = parse(source)
        lines = source.splitlines()
        for node, code in shapes(tree) if tree is not None else ():
            if len(code) >= least_nodes:
                yield Function(node.name, "\n".join(lines[node.lineno - 1 : node.end_lineno]), code)


def shapes(tree: ast.AST) -> Iterator[tuple[Any, str]]:
    """Write the node types of each function in a tree, inner functions first: (node, one character per node).

    The order is that of a depth-first walk; docstrings and annotations do not count.
    """
    found: list[str] = []
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, tuple):  # everything inside this function has been seen
            yield node[0], "".join(found[node[1] :])
            continue
        if isinstance(node, _FUNCTIONS):
            waiting.append((node, len(found)))
        character, fields = _FORM[type(node)]
        found.append(character)
        children: list[ast.AST] = []
        for field in fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                inner = value[1:] if field == "body" and _is_docstring(value) else value
                children += [item for item in inner if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST):
                children.append(value)
        waiting += reversed(children)


def _is_docstring(body: list[Any]) -> bool:
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


class Shapes:
    """The functions of benchmarks, to compare others with."""

    def __init__(self, known: Sequence[tuple[str, str]], match_rate: float) -> None:
        """Take (name of the record, shape) of each function, and the least rate of a match."""
        self._names = [name for name, _ in known]
        self._shapes = [code for _, code in known]
        self._match_rate = match_rate

    def __len__(self) -> int:
        return len(self._shapes)

    @cached_property
    def _by_length(self) -> list[tuple[int, int]]:
        return sorted((len(code), i) for i, code in enumerate(self._shapes))

    def nearest(self, code: str) -> tuple[str, float] | None:
        """Find the known function with the highest match rate: (its record's name, rate); None if none reaches τ."""
        from bisect import bisect_left, bisect_right

        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import extractOne

        # Sequences whose lengths differ too much cannot reach the rate.
        low = bisect_left(self._by_length, (int(len(code) * self._match_rate), -1))
        high = bisect_right(self._by_length, (int(len(code) / self._match_rate) + 1, len(self._shapes)))
        near = [i for _, i in self._by_length[low:high]]
        found = extractOne(
            code,
            [self._shapes[i] for i in near],
            scorer=Levenshtein.normalized_similarity,
            processor=None,
            score_cutoff=self._match_rate,
        )
        return None if found is None else (self._names[near[found[2]]], float(found[1]))

"""Faults of a kernel's source, found in its syntax tree: each is one place of the text and what stands there instead.

Kernels (`@triton.jit`) get every kind of fault; host code gets those that change what a kernel is given.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("mask", "compare", "stride", "index", "cast", "constant", "operand", "extremum", "other")
"""A mask dropped, < for <=, another tensor's or axis's stride, one element further, no conversion, another number, an
accumulation or operands exchanged, max for min, another value of the lanes that a load masks."""

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
OPERATORS = {ast.Add: "-", ast.Mult: "+", ast.FloorDiv: "%", ast.Mod: "//", ast.RShift: "<<"}
EXTREMA = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "atomic_max": "atomic_min"}


@dataclass(frozen=True)
class Fault:
    """`source[start:end]` of `path` becomes `text`."""

    path: str
    function: str
    kind: str
    start: int
    end: int
    text: str
    before: str
    """The lines that change, without the spaces around them."""
    after: str
    nth: int
    """Which of those with the same lines it is."""

    @property
    def key(self) -> str:
        """Stays the same when lines are added elsewhere."""
        return f"{self.path}:{self.function}: {self.before} -> {self.after} #{self.nth}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def faults(path: str, source: bytes) -> list[Fault]:
    """All faults of one file, without those that change nothing, in the order of their places."""
    tree = ast.parse(source)
    found, seen = [], Counter[tuple[str, str, str]]()
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for kind, node, text in sorted(_of(function), key=lambda place: (place[1].lineno, place[1].col_offset)):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            if isinstance(node, ast.expr) and ast.dump(node) == ast.dump(ast.parse(f"({text})", mode="eval").body):
                continue
            before, after = _lines(source, source[:start] + text.encode() + source[end:])
            nth = seen[function.name, before, after]
            seen[function.name, before, after] += 1
            found.append(Fault(path, function.name, kind, start, end, text, before, after, nth))
    return found


def chosen(everything: list[Fault], most: int) -> list[Fault]:
    """At most `most` of each file and kind, in an order that depends on nothing but their lines: first one of every
    file and kind, then a second."""
    cells: dict[tuple[str, str], list[Fault]] = {}
    for fault in sorted(everything, key=lambda fault: hashlib.sha256(fault.key.encode()).digest()):
        cells.setdefault((fault.path, fault.kind), []).append(fault)
    return [cell[i] for i in range(most) for _, cell in sorted(cells.items()) if i < len(cell)]


def diff(fault: Fault, source: bytes) -> str:
    """As `diff -u` shows it, with one line around."""
    old, new = (text.decode().splitlines() for text in (source, fault.applied(source)))
    return "\n".join(difflib.unified_diff(old, new, fault.path, f"{fault.path} ({fault.kind})", lineterm="", n=1))


def _lines(source: bytes, changed: bytes) -> tuple[str, str]:
    """From the first line that differs to the last, of both."""
    old, new = source.decode().splitlines(), changed.decode().splitlines()
    first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    last = next(i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
    before, after = old[first : len(old) - last], new[first : len(new) - last]
    return " ".join(map(str.strip, before)), " ".join(map(str.strip, after))


def _of(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """(kind, node, text in its place)."""
    jitted = any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)
    strides = [argument.arg for argument in function.args.args if "stride" in argument.arg]
    for node in (node for statement in function.body for node in ast.walk(statement)):
        if jitted:
            yield from _of_kernel(node, strides)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".stride") and node.args:
            yield "stride", node, f"{ast.unparse(node.func)}({1 if ast.unparse(node.args[0]) == '0' else 0})"
        elif function.name in HOST:
            yield from _comparisons(node)
            yield from _constants(node)
            yield from _operands(node)


HOST = ("attributes", "_type", "_multiple_of_16", "signature", "constexprs", "__call__")
"""Functions of common.py that describe a launch."""


def _of_kernel(node: ast.AST, strides: list[str]) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    yield from _comparisons(node)
    yield from _constants(node)
    yield from _operands(node)
    if isinstance(node, ast.Call):
        yield from _calls(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield "mask", node, f"({ast.unparse(node.left)})"
        yield "mask", node, f"({ast.unparse(node.right)})"
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in strides and len(strides) > 1:
        yield "stride", node, strides[(strides.index(node.id) + 1) % len(strides)]


def _comparisons(node: ast.AST) -> Iterator[tuple[str, ast.expr, str]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield "compare", node, f"{left} {COMPARISONS[type(node.ops[0])]} {right}"


def _constants(node: ast.AST) -> Iterator[tuple[str, ast.expr, str]]:
    """Numbers that are computed with; the first argument of tl.arange, an axis and a shape are none."""
    if isinstance(node, ast.BinOp | ast.Compare | ast.Assign | ast.AnnAssign | ast.UnaryOp):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Constant) and type(child.value) is float:
                yield "constant", child, repr(child.value * 1.01 if child.value else 1.0)
            elif isinstance(child, ast.Constant) and type(child.value) is int:
                yield "constant", child, str(child.value + 1)


def _operands(node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.AugAssign):
        yield "operand", node, f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
    if isinstance(node, ast.BinOp):
        left, right = (f"({ast.unparse(side)})" for side in (node.left, node.right))
        if isinstance(node.op, ast.Sub | ast.Div):
            yield "operand", node, f"({right} {'-' if isinstance(node.op, ast.Sub) else '/'} {left})"
        elif type(node.op) in OPERATORS:
            yield "operand", node, f"({left} {OPERATORS[type(node.op)]} {right})"


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.expr, str]]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    arguments = [ast.unparse(argument) for argument in node.args]
    if name in ("tl.load", "tl.store", "tl.atomic_max"):
        pointer, *values = arguments
        rest = [f"{key}={ast.unparse(value)}" for key, value in given.items()]
        yield "index", node, f"{name}({', '.join([f'{pointer} + 1', *values, *rest])})"
        if "mask" in given:
            kept = [text for text in rest if not text.startswith(("mask=", "other="))]
            yield "mask", node, f"{name}({', '.join([*arguments, *kept])})"
        if "other" in given:
            value = "1.0" if ast.unparse(given["other"]) == "0.0" else "0.0"
            others = [f"other={value}" if text.startswith("other=") else text for text in rest]
            yield "other", node, f"{name}({', '.join([*arguments, *others])})"
    elif name == "tl.where":
        yield "mask", node, f"({arguments[1]})"
    elif name in ("tl.arange", "tl.program_id"):
        yield "index", node, f"(1 + {ast.unparse(node)})"
    elif name == "range" and len(arguments) > 1:
        yield "index", node, f"range({arguments[0]} + 1, {', '.join(arguments[1:])})"
    elif name.startswith("tl.") and name[3:] in EXTREMA:
        changed = [f"{key}={ast.unparse(value)}" for key, value in given.items()]
        yield "extremum", node, f"tl.{EXTREMA[name[3:]]}({', '.join([*arguments, *changed])})"
    elif name.endswith(".to") and isinstance(node.func, ast.Attribute):
        yield "cast", node, f"({ast.unparse(node.func.value)})"
    elif name in ("tl.cast", "narrow"):
        yield "cast", node, f"({arguments[0]})"

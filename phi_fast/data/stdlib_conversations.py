"""`python -m phi_fast.data.stdlib_conversations OUT.jsonl`: conversations about Python's own standard library.

Text that every machine has, for trying fine-tuning: a question about a function or a class, answered by the first
paragraph of its docstring, then how it is called. The result depends only on the Python version. No module is imported
for it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.data.stdlib_conversations")

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import UsageError
from ..files import write_atomically, writing
from ..startup import tolerate_encodings
from ..terminal import console, printable
from .stdlib_corpus import heading, read_sources

LONGEST = 300
"""Length of the longest answer, in characters: a conversation then fits into a row of 256 tokens."""


@dataclass(frozen=True)
class Options:
    """Write conversations about the standard library, one JSON object with "messages" per line."""

    out: Annotated[Path, tyro.conf.Positional]
    """File to write, in JSONL."""
    count: int = 400
    """Number of conversations; fewer if the library does not have as many."""


Conversation = dict[str, list[dict[str, str]]]
"""{"messages": [{"role": …, "content": …}, …]}."""


def conversations(count: int) -> list[Conversation]:
    """Return `count` conversations about objects from all over the library, in an order without a system."""
    found: dict[str, Conversation] = {}
    for module, source in read_sources().items():
        if not any(part.startswith("_") for part in module.split(".")):
            found |= dict(_about(module, source))
    chosen = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
    return [found[name] for name in chosen]


def _about(module: str, source: str) -> Iterator[tuple[str, Conversation]]:
    """Yield (qualified name, conversation) for each documented function and class at the top of a module."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        answer = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        name = f"{module}.{node.name}"
        called = heading(node, name)
        if answer and max(len(answer), len(called)) <= LONGEST:
            turns = [f"What does {name} do?", answer, "How is it called?", called]
            if isinstance(node, ast.ClassDef):
                turns = [f"What is {name}?", answer]
            yield (
                name,
                {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]},
            )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 1 after an error."""
    tolerate_encodings()
    options = tyro.cli(Options, args=arguments, prog="python -m phi_fast.data.stdlib_conversations")
    try:
        if options.count < 1:
            raise UsageError(f"--count {options.count}: expected at least 1")
        with writing(options.out, "make room or grant write permission, or name another file"):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in conversations(options.count)]
            write_atomically(options.out.resolve(), "".join(lines).encode())
    except (UsageError, OSError) as error:
        print(f"phi_fast.data.stdlib_conversations: {printable(str(error))}", file=sys.stderr)
        return 1
    console(soft_wrap=True).print(f"written: {printable(str(options.out))}, {len(lines):,} conversations")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What `accelerate` did to a model, for people to read and programs to look up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Modules of one class that were treated alike."""

    module: str
    """Class name in transformers or torch, as "PhiDecoderLayer"."""
    count: int
    """How many of them the model has."""
    note: str
    """The ops that run in their place, or why they were left."""


@dataclass(frozen=True)
class Report:
    """What runs on this library's ops now, what does not, and when the model's own code still runs."""

    model: str
    """The model's class."""
    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]
    rules: tuple[str, ...]
    """When a replaced module runs the model's own code in a call, decided from shapes, masks and settings alone."""

    def __str__(self) -> str:
        lines = [f"accelerate({self.model})"]
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            lines.append(f"  {title}:" if entries else f"  {title}: nothing")
            lines += [f"    {entry.count:3} x {entry.module}: {entry.note}" for entry in entries]
        lines.append("  the model's own code runs:")
        return "\n".join(lines + [f"    - {rule}" for rule in self.rules])

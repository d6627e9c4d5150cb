"""What the compilers make of every Triton kernel at phi-1.5's shapes, for GPUs that need not be there.

    python -m phi_fast.kernels.codegen                                    a table
    python -m phi_fast.kernels.codegen --check                            and what is wrong, of all that the ops accept
    python -m phi_fast.kernels.codegen --markdown docs/codegen.md --json codegen.json

The table holds the kernels as phi-1.5 calls them. `--check` compiles what else the ops accept too (dtypes, masks,
documents, rotations, groups, options), and exits with status 1 if anything is wrong. Wrong is: a register spilled to
memory, except by fp32 attention, where it is remarked; a load or store narrower than 128 bits where every thread has
that much to move, or that could not be found; a 16-bit matrix product without tensor-core instructions, or, on sm_90,
with a wait for each; more shared memory than a block may have. Nothing is timed: occupancy and bytes are computed from
the code and the shapes.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .backend import BackendUnavailable, interpreting

if TYPE_CHECKING:
    from .triton.compiled import Architecture, Compiled
    from .triton.specimens import Specimen

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Options:
    """Compile every Triton kernel and report registers, spills, shared memory, access widths and tensor-core use."""

    arch: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """GPU architectures to compile for."""
    only: str = ""
    """Only kernels whose name or note contains this, for example "attention.dq"."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Storage dtype of the kernels in the table."""
    check: bool = False
    """Compile everything that the ops accept, and exit with status 1 where a kernel spills, moves data in narrow
    pieces, or leaves the tensor cores idle."""
    json: Path | None = None
    """Write every figure, with each load's and store's source line, to this file."""
    markdown: Path | None = None
    """Write the tables to this file."""


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    arch: str
    specimen: Specimen
    compiled: Compiled
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    tabled: bool
    """It is in the table, and not only among what `--check` compiles."""


def rows(options: Options) -> Iterator[Row]:
    """Compiles one specimen after the other. Raises BackendUnavailable where Triton cannot compile."""
    _require_compiler()
    from .triton.compiled import ARCHITECTURES as KNOWN
    from .triton.compiled import compile_launch
    from .triton.specimens import specimens, variants

    for arch in options.arch:
        tabled = [(specimen, True) for specimen in specimens(arch, getattr(torch, options.dtype))]
        others = [(specimen, False) for specimen in variants(arch)] if options.check else []
        for specimen, in_table in tabled + others:
            if options.only in f"{specimen.name} {specimen.note}":
                compiled = compile_launch(specimen.launch, KNOWN[arch])
                wrong = problems(compiled, KNOWN[arch])
                yield Row(arch, specimen, compiled, wrong, remarks(compiled), in_table)


def problems(compiled: Compiled, architecture: Architecture) -> tuple[str, ...]:
    """What `--check` fails on, in words; empty where all is well."""
    found = []
    if compiled.spilled and not remarks(compiled):
        found.append(f"spills {compiled.spilled} bytes per thread")
    if compiled.shared > architecture.shared_block:
        found.append(f"wants {compiled.shared} bytes of shared memory, a block may have {architecture.shared_block}")
    if compiled.products and not compiled.tensor_core:
        found.append("multiplies matrices without tensor-core instructions")
    if compiled.serialised:
        found.append("waits for each wgmma before the next (ptxas C7515)")
    if not compiled.accesses:
        found.append("moves no tile that could be found: its widths were not checked")
    found += [f"has an access that could not be read: {line}" for line in compiled.unread]
    for access in compiled.accesses:
        verb = "stores" if access.store else "loads"
        if not access.bits:
            found.append(f"{verb} {access.tile} at {access.source} by no instruction that could be found")
        elif access.narrow(architecture):
            found.append(f"{verb} {access.tile} by {access.bits[0]} bits at {access.source}")
    return tuple(found)


def remarks(compiled: Compiled) -> tuple[str, ...]:
    """What `--check` says and does not fail on: fp32 products run on the ordinary units, from registers."""
    if compiled.spilled and compiled.wide_products and not compiled.products:
        return (f"spills {compiled.spilled} bytes per thread, in fp32",)
    return ()


def _require_compiler() -> None:
    if interpreting():
        raise BackendUnavailable("TRITON_INTERPRET=1 replaces the compiler: unset it to look at compiled code")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise BackendUnavailable("codegen compiles with triton, which is not installed: pip install triton") from error


HEADINGS = (
    "kernel", "shape", "registers", "spilled B", "shared KiB", "occupancy", "limited by",
    "load bits", "store bits", "tensor cores", "bytes, MB", "of the bound",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    specimen, compiled = row.specimen, row.compiled
    tensor_core = ", ".join(f"{count} {kind}" for kind, count in compiled.tensor_core.items())
    return (
        specimen.name,
        specimen.note,
        str(compiled.registers),
        str(compiled.spilled),
        f"{compiled.shared / 1024:.1f}",
        f"{compiled.occupancy:.0%}",
        compiled.limit,
        _widths(compiled, store=False),
        _widths(compiled, store=True),
        tensor_core or "–",
        f"{specimen.bytes_moved / 1e6:.1f}",
        f"{specimen.bytes_moved / specimen.bytes_bound:.2f}×",
    )


def _widths(compiled: Compiled, *, store: bool) -> str:
    """ "128, 32*": the widths of tiles, widest first; a star marks those of tiles too small to fill a wide access."""
    whole: set[int] = set()
    small: set[int] = set()
    for access in compiled.accesses:
        if access.store == store:
            (whole if access.bytes_each >= 16 else small).update(access.bits)
    words = [str(bits) for bits in sorted(whole, reverse=True)]
    words += [f"{bits}*" for bits in sorted(small - whole, reverse=True)]
    return ", ".join(words) or "–"


def as_json(row: Row) -> dict[str, Any]:
    launch = row.specimen.launch
    return {
        "arch": row.arch,
        "kernel": row.specimen.name,
        "note": row.specimen.note,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "constants": {name: str(value) for name, value in launch.constants.items()},
        "bytes_moved": row.specimen.bytes_moved,
        "bytes_bound": row.specimen.bytes_bound,
        "problems": row.problems,
        "remarks": row.remarks,
        **asdict(row.compiled),
    }


def as_markdown(found: list[Row]) -> str:
    from triton import __version__ as version

    from .triton.compiled import ARCHITECTURES as KNOWN

    lines = [
        "# What the compilers make of the kernels",
        "",
        "Written by `python -m phi_fast.kernels.codegen --markdown docs/codegen.md`. Compiled, not run: no figure here",
        f"is a time. Compiler: Triton {version}. Registers, spills and shared memory are the compiler's; occupancy is",
        "what they leave of a multiprocessor's warps; bytes are what a launch reads and writes at these shapes, beside",
        "the fewest that the work needs. Widths are those of the instructions that move tiles; a star marks tiles with",
        "less than 16 bytes per thread (row statistics, positions), where nothing wider is possible. On gfx942 a 64-"
        "bit store counts as wide: 64 lanes fill with it the 512 bytes that a warp's 32 fill with 128 bits.",
    ]
    for arch in dict.fromkeys(row.arch for row in found):
        lines += [
            "",
            f"## {arch} ({KNOWN[arch].gpu})",
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|---" * len(HEADINGS) + "|",
        ]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in found if row.arch == arch and row.tabled]
    lines += ["", "## Problems", ""]
    wrong = [f"- {row.arch} {row.specimen.name}, {row.specimen.note}: {what}" for row in found for what in row.problems]
    lines += wrong or ["None."]
    said = [f"- {row.arch} {row.specimen.name}, {row.specimen.note}: {what}" for row in found for what in row.remarks]
    lines += ["", *said] if said else []
    lines += ["", f"Compiled: {len(found)} launches, of which the tables show {sum(row.tabled for row in found)}."]
    return "\n".join(lines) + "\n"


def _print(found: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
    for arch in dict.fromkeys(row.arch for row in found):
        table = Table(title=f"{arch}: compiled, not run")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("kernel", "shape", "limited by") else "right")
        for row in found:
            if row.arch == arch and row.tabled:
                table.add_row(*cells(row), style="red" if row.problems else None)
        console.print(table)
    for row in found:
        for what in (*row.problems, *row.remarks):
            style = "red" if what in row.problems else None
            console.print(f"{row.arch} {row.specimen.name} ({row.specimen.note}): {what}", style=style)
    console.print(f"{len(found)} launches compiled, {sum(bool(row.problems) for row in found)} with problems")


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and writes the files asked for; the exit status of the command."""
    try:
        import tyro
    except ImportError:
        print("error: phi_fast.kernels.codegen needs tyro and rich: pip install 'phi-fast[train]'", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # dashes and × on an encoding that lacks them
            stream.reconfigure(errors="backslashreplace")
    options = tyro.cli(Options, args=arguments, prog="python -m phi_fast.kernels.codegen")
    found = []
    try:
        for row in rows(options):
            found.append(row)
            print(f"\r{row.arch} {row.specimen.name:<40}", end="", file=sys.stderr, flush=True)
    except BackendUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)
    if not found:
        print(f"no kernel's name or note contains {options.only!r}", file=sys.stderr)
        return 2
    _print(found)
    if options.json is not None:
        options.json.write_text(json.dumps([as_json(row) for row in found], indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(found))
    return 1 if options.check and any(row.problems for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())

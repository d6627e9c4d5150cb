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

A whole `--check` compiles about 500 launches per architecture, some 12 minutes of one processor each; problems are
printed as they are found, phi-1.5's own launches first, then 16 bits before fp32. It may be stopped at any time: Triton
keeps what it compiled in its cache (~/.triton/cache, or TRITON_CACHE_DIR), so that the same command goes on from there.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    beside: tuple[Path, ...] = ()
    """`--json` files of earlier runs, for example with another Triton: the Markdown counts their launches and lists
    their problems."""


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


class Planned(NamedTuple):
    """One launch to compile."""

    arch: str
    specimen: Specimen
    tabled: bool


def plan(options: Options) -> list[Planned]:
    """The launches of the tables, and after them, with `check`, all others, each once.

    Raises BackendUnavailable where Triton cannot compile.
    """
    _require_compiler()
    from .triton.specimens import compiled_as, specimens, variants

    tabled, others = [], []
    for arch in options.arch:
        in_table = specimens(arch, getattr(torch, options.dtype))
        known = {compiled_as(specimen.launch) for specimen in in_table}
        tabled += [Planned(arch, specimen, True) for specimen in in_table]
        if options.check:
            more = (specimen for specimen in variants(arch) if compiled_as(specimen.launch) not in known)
            others += [Planned(arch, specimen, False) for specimen in more]
    return [launch for launch in tabled + others if options.only in f"{launch.specimen.name} {launch.specimen.note}"]


def rows(planned: list[Planned]) -> Iterator[Row]:
    """Compiles one launch after the other."""
    from .triton.compiled import ARCHITECTURES as KNOWN
    from .triton.compiled import compile_launch

    for arch, specimen, tabled in planned:
        compiled = compile_launch(specimen.launch, KNOWN[arch])
        yield Row(arch, specimen, compiled, problems(compiled, KNOWN[arch]), remarks(compiled), tabled)


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
    from triton import __version__ as version

    launch = row.specimen.launch
    return {
        "triton": version,
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


def as_markdown(found: list[Row], beside: list[dict[str, Any]]) -> str:
    """The tables of `found`, and what was wrong there and in `beside`, which is of other runs, as `as_json` writes."""
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
        "bit store counts as wide: 64 lanes fill with it the 512 bytes that a warp's 32 fill with 128 bits. Spills are",
        "there the scratch memory that the code asks for; how its matrix instructions overlap is not looked at.",
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
    lines += [
        "",
        "## Checked",
        "",
        "| Triton | target | launches compiled | of | with problems |",
        "|---|---|---:|---:|---:|",
    ]
    every = {(x["triton"], x["arch"], x["kernel"], x["note"]): x for x in (*map(as_json, found), *beside)}
    launches = list(every.values())
    for compiler in dict.fromkeys((launch["triton"], launch["arch"]) for launch in launches):
        these = [launch for launch in launches if (launch["triton"], launch["arch"]) == compiler]
        wrong = sum(bool(launch["problems"]) for launch in these)
        lines += [f"| {' | '.join(compiler)} | {len(these)} | {_accepted(compiler[1])} | {wrong} |"]
    for heading in ("problems", "remarks"):
        lines += ["", f"## {heading.capitalize()}", ""]
        said = [
            f"- Triton {launch['triton']}, {launch['arch']} {launch['kernel']}, {launch['note']}: {what}"
            for launch in launches
            for what in launch[heading]
        ]
        lines += said or ["None."]
    return "\n".join(lines) + "\n"


def _accepted(arch: str) -> int:
    """Launches that a whole `--check` compiles for `arch`."""
    return len(plan(Options(arch=(arch,), check=True)))  # type: ignore[arg-type]


def _print(found: list[Row], planned: int) -> None:
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
    console.print(
        f"{len(found)} of {planned} launches compiled, {sum(bool(row.problems) for row in found)} with problems"
    )


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
    try:
        planned = plan(options)
        beside = [launch for path in options.beside for launch in json.loads(path.read_text())]
    except (BackendUnavailable, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not planned:
        print(f"no kernel's name or note contains {options.only!r}", file=sys.stderr)
        return 2
    found, stopped = _compile(planned)
    _print(found, len(planned))
    if options.json is not None:
        options.json.write_text(json.dumps([as_json(row) for row in found], indent=1) + "\n")
    if stopped:
        print("stopped: the same command goes on from here, with what Triton's cache holds", file=sys.stderr)
        return 130
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(found, beside))
    return 1 if options.check and any(row.problems for row in found) else 0


def _compile(planned: list[Planned]) -> tuple[list[Row], bool]:
    """What was compiled until the end or an interrupt, and whether it was an interrupt. Says how far it is, and each
    problem at once."""
    found: list[Row] = []
    try:
        for row in rows(planned):
            found.append(row)
            for what in row.problems:
                print(f"\r{row.arch} {row.specimen.name} ({row.specimen.note}): {what}", file=sys.stderr)
            progress = f"{len(found)} of {len(planned)}: {row.arch} {row.specimen.name}"
            print(f"\r{progress:<60}", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return found, True
    finally:
        print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)
    return found, False


if __name__ == "__main__":
    sys.exit(main())

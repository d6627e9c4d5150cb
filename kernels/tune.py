"""Tiles of every Triton kernel, timed on this machine's GPU at a model's sizes; a table of the fastest is kept.

    python -m phi_fast.kernels.tune --seconds 300                  phi-1.5, into the user's cache folder
    python -m phi_fast.kernels.tune --ops attention --sequence 4096
    python -m phi_fast.kernels.tune --list --arch sm_90            what would be timed; needs no GPU

The table is read at the first launch in a process (`phi_fast.kernels.tuned`); without one, and at sizes that it does
not have, the kernels keep the tiles that were chosen by hand. Nothing is tuned at import or inside a step. Tiles that
the compiler spills to memory, or whose matrix products it serialises, are known before and never timed. A kernel gets a
share of the seconds like its share of a step, the most important first, and the table is written after each: a stop
keeps what is done.
"""

from __future__ import annotations

import datetime
import importlib
import io
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import tuned
from .backend import interpreting
from .tuning.shape import Shape

if TYPE_CHECKING:
    from .tuning.sweep import Tools

Op = Literal[
    "attention", "rotary", "layer_norm", "bias_gelu", "gated_activation", "linear_cross_entropy", "adam", "muon"
]


RIVALS = 0.15
"""The share of the seconds in which attention's other back ends are timed."""


class CannotTune(Exception):
    """What was asked for cannot be tuned here; the message says what to do."""


@dataclass(frozen=True)
class Options(Shape):
    """Time the Triton kernels' tiles on this GPU at a model's sizes, and keep a table of the fastest."""

    seconds: float = 300.0
    """Seconds that the sweep may take."""
    ops: tuple[Op, ...] = ()
    """Ops to tune; none: all."""
    dtypes: tuple[Literal["float16", "bfloat16", "float32"], ...] = ("float16",)
    """dtypes of weights and activations."""
    json: Path | None = None
    """Write the table to this file, which PHI_FAST_TUNED=FILE uses. Default: the cache folder, where it is found."""
    most: int = 48
    """Tiles to compile per kernel at most, the nearest to the one chosen by hand first."""
    list: bool = False
    """Only compile, and print which tiles would be timed and why the others would not; needs no GPU."""
    arch: Literal["sm_80", "sm_90", "sm_100", "gfx942"] = "sm_90"
    """GPU architecture that --list compiles for."""

    def check(self) -> None:
        """Raises ValueError, naming the option, its value and what was expected."""
        super().check()
        absent = "bias_gelu" if self.gated else "gated_activation"
        if absent in self.ops:
            raise ValueError(
                f"--ops {absent}: a model with {'--gated' if self.gated else 'no --gated'} does not call it"
            )
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"--seconds {self.seconds:g}: expected a positive number")
        if self.most < 1:
            raise ValueError(f"--most {self.most}: expected at least 1")


def main(arguments: Any = None) -> int:
    """Runs the command; returns its exit status: 0, 2 with a message where nothing can be tuned, 130 after Ctrl-C."""
    try:
        import tyro
    except ImportError:
        print("error: phi_fast.kernels.tune needs tyro: pip install 'phi-fast[train]'", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = tyro.cli(Options, args=arguments, prog="python -m phi_fast.kernels.tune", description=__doc__)
    try:
        options.check()
        _require_compiler()
        show(options) if options.list else tune(options, *_gpu(options.most))
    except (CannotTune, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: these sizes do not fit into the GPU's free memory: give fewer --rows", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the table keeps what was measured", file=sys.stderr)
        return 130
    return 0


def _require_compiler() -> None:
    if interpreting():
        raise CannotTune("TRITON_INTERPRET=1 replaces the compiler: unset it to tune what is compiled")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise CannotTune(
            "tiles are those of Triton's kernels, and triton is not installed: pip install triton"
        ) from error


def show(options: Options, tell: Callable[[str], None] = print) -> None:
    """What would be timed on `options.arch`: every kernel's candidates, compiled, and why some are ruled out."""
    from .triton.common import recording
    from .triton.compiled import ARCHITECTURES, compile_launch
    from .tuning.candidates import choices, first, judged
    from .tuning.subjects import every

    known = set[tuple[str, Any]]()
    for call in every(options, _dtypes(options), torch.device("meta"), options.ops):
        with recording(options.arch):
            run = call.prepare()
        for choice in choices(run, options.arch):
            if (choice.tunable.name, choice.case) in known:
                continue
            known.add((choice.tunable.name, choice.case))
            tell(f"{choice.tunable.name}: {_words(choice.case)}")
            found, by_hand = first(run, options.arch, choice, options.most), True
            verdicts = judged(found, compile_launch, ARCHITECTURES[options.arch])
            faults = {candidate.tile: why for candidate, why in verdicts}
            for candidate in found:
                why = faults[candidate.tile]
                verdict = f"not timed: {why}" if why else "timed"
                if by_hand:
                    verdict = f"timed, chosen by hand{', though it ' * bool(why)}{why}"
                tell(f"  {_words(candidate.tile)}: {verdict}")
                by_hand = False


def _gpu(most: int) -> tuple[Tools, str]:
    """The tools of this GPU, for `most` candidates per kernel, and its name. Raises CannotTune without a GPU."""
    if not torch.cuda.is_available():
        raise CannotTune(
            "torch sees no GPU here, and tiles are timed on one; --list shows what would be timed, without a GPU"
        )
    from .triton.attention_tiles import architecture
    from .triton.compiled import compile_here
    from .tuning.sweep import Tools
    from .tuning.timing import KernelTimer, on_stream

    device = torch.device("cuda", torch.cuda.current_device())
    workers = min(8, os.cpu_count() or 1)
    tools = Tools(architecture(device), compile_here, KernelTimer, time.monotonic, on_stream, workers, most)
    return tools, torch.cuda.get_device_name(device)


def tune(
    options: Options,
    tools: Tools,
    gpu: str,
    device: torch.device | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Sweep the kernels of `options` and write the table after each; tools, gpu, device: of the GPU, or stand-ins.

    Raises CannotTune where the table cannot be written.
    """
    from .tuning.rivals import compare
    from .tuning.subjects import Make, every
    from .tuning.sweep import sweep

    path = options.json or tuned.place(gpu)
    if path is None:
        raise CannotTune(f"there is no folder for the table ({tuned.VARIABLE} is empty): name a file with --json")
    document = begin(path, gpu, tools.architecture)

    dropped = Counter[str]()

    def keep(entry: dict[str, Any]) -> None:
        document["tiles"] = [other for other in document["tiles"] if not _same(other, entry)] + [entry]
        _write(path, document)
        dropped.update(entry["dropped"])

    where = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    _write(path, document)  # a folder that cannot be written is known before anything is timed
    rivals = not options.ops or "attention" in options.ops
    end = tools.clock() + options.seconds
    calls = every(options, _dtypes(options), where, options.ops)
    sweep(calls, tools, options.seconds * (1 - RIVALS * rivals), keep, tell)
    if rivals:
        for dtype in _dtypes(options):
            result = compare(Make(options, dtype, where), tools, document["tiles"], end, tell)
            document["backends"] = [other for other in document["backends"] if other.get("case") != result["case"]]
            document["backends"].append(result)
            _write(path, document)
    tell(f"not timed: {', '.join(f'{count} {why}' for why, count in dropped.items()) or 'none'}")
    tell(f"{len(document['tiles'])} tiles are in {path}")


def _same(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    return (entry.get("kernel"), entry.get("case")) == (other["kernel"], other["case"])


def begin(path: Path, gpu: str, architecture: str) -> dict[str, Any]:
    """The table in `path`, to be continued where it is of this GPU and this Triton; else a new one."""
    try:
        found = tuned.usable(path, gpu).document
    except (FileNotFoundError, tuned.TableError):
        found = {"tiles": [], "backends": []}
    except OSError as error:
        raise CannotTune(f"{path} cannot be read ({error.strerror}): name another file with --json") from error
    versions = {**tuned.versions(), "torch": torch.__version__}
    measured = datetime.datetime.now().isoformat(timespec="seconds")
    head = {"version": tuned.VERSION, "gpu": gpu, "architecture": architecture, **versions, "measured": measured}
    return {**head, "tiles": found["tiles"], "backends": found["backends"]}


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        tuned.write(path, document)
    except OSError as error:
        raise CannotTune(f"{path} cannot be written ({error.strerror}): name another file with --json") from error


def _dtypes(options: Options) -> Any:
    return [getattr(torch, name) for name in options.dtypes]


def _words(fields: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields._asdict().items())


if __name__ == "__main__":
    sys.exit(main())

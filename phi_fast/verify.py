"""`python -m phi_fast.verify`: check that the kernels are correct on this machine. Run it first on a new GPU.

Every op and the whole model run forward and backward on each available back end. Their errors against float64 are
compared with plain PyTorch's at the same dtype, and two runs must agree bit for bit. The exit status is 0 if all errors
are within bounds, 1 if one is not, 2 if a check could not run.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.verify", "PyTorch")

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import terminal
from .conversion.load import choose_device
from .errors import PhiFastError, UsageError
from .kernels import in_use
from .kernels.backend import BACKENDS, VENDORS, cpp_instructions, interpreting, isa_problem, tiles
from .precision import DTYPES
from .startup import tolerate_encodings
from .verification import golden
from .verification.cases import cases
from .verification.judge import Case, Verdict, judge

Op = Literal[
    "rotary", "layer_norm", "bias_gelu", "gated_activation", "attention", "linear_cross_entropy", "adam", "model"
]
Backend = Literal["triton", "cpp", "reference", "sdpa", "cudnn", "flash-attn", "flash-attn-3", "flash-attn-4", "apex"]
OPS_AND_MODEL: tuple[Op, ...] = get_args(Op)
BACKENDS_AND_VENDORS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class Options:
    """Check the kernels on this machine against float64."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to check; "auto" is the GPU if torch sees one. For Triton on a CPU, set TRITON_INTERPRET=1 (slow)."""
    ops: tuple[Op, ...] = OPS_AND_MODEL
    """Ops to check, and the model."""
    backends: tuple[Backend, ...] = BACKENDS_AND_VENDORS
    """Back ends to check; those that cannot run here are skipped."""
    dtypes: tuple[Literal["fp32", "fp16", "bf16"], ...] = ("fp32", "fp16", "bf16")
    """dtypes of the inputs."""
    factor: float = 2.0
    """Bound on root mean square errors, as a multiple of plain PyTorch's; largest errors may reach twice that."""
    checkpoint: str | None = None
    """Also compare logits with the published ones of phi-1.5: "microsoft/phi-1_5", or a folder with it (6 GB)."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every error to this file."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    tolerate_encodings()
    options = tyro.cli(Options, args=arguments, prog="python -m phi_fast.verify", description=__doc__)
    console = terminal.table_console()
    try:
        if problem := isa_problem():
            raise UsageError(problem)
        report = run(options, console)
    except (PhiFastError, OSError) as error:
        print(f"phi_fast.verify: {error}", file=sys.stderr)
        return 2
    return 0 if report["ok"] else 1


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the checks, print the table and write the JSON file; returns its content.

    Raises UsageError for a device that is not available, ConversionError for a checkpoint that cannot be loaded.
    """
    device = _device(options.device)
    logits = golden.check(options.checkpoint, device) if options.checkpoint else None  # first, because it may fail
    machine = _machine(device)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    console.print("auto: " + ", ".join(f"{op} {name}" for op, name in in_use(device).items()))

    start = time.perf_counter()
    verdicts: list[Verdict] = []
    for case in cases(device):
        if case.op in options.ops:
            for dtype in options.dtypes:
                verdicts += judge(case, DTYPES[dtype], device, _backends(case, options, device), options.factor)
    seconds = time.perf_counter() - start
    _print(verdicts, console)
    ok = all(verdict.status != "fail" for verdict in verdicts)
    if logits is not None:
        ok = ok and logits.ok
        found = f"{logits.checkpoint}: logits within {logits.largest_error:.1e} of the published ones"
        console.print(f"{found} (tolerance {logits.tolerance:.0e}):", _word(logits.ok))
    count = {status: sum(verdict.status == status for verdict in verdicts) for status in ("ok", "fail", "not run")}
    console.print(f"{count['ok']} ok, {count['fail']} failed, {count['not run']} not run; {seconds:.0f} s")
    report = {
        "ok": ok,
        "machine": machine,
        "factor": options.factor,
        "seconds": seconds,
        "verdicts": [{**asdict(verdict), "worst": verdict.worst} for verdict in verdicts],
        "checkpoint": None if logits is None else asdict(logits),
    }
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=1))
    return report


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda, and torch sees no GPU here: install a CUDA build of torch, or use --device cpu"
        )
    return choose_device(name)


def _machine(device: torch.device) -> dict[str, str]:
    try:
        import triton

        version = triton.__version__ + (" interpreted" if device.type == "cpu" and interpreting() else "")
    except ImportError:
        version = "not installed"
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    versions = {"torch": torch.__version__, "triton": version, "python": platform.python_version()}
    measured = {"tiles": tiles(device)} if device.type == "cuda" else {}
    return {"device": chip, "C++ kernels": cpp_instructions(), **versions, **measured}


def _backends(case: Case, options: Options, device: torch.device) -> list[str]:
    """List the requested back ends for a case's op.

    The model runs on each of this project's back ends, and with each vendor's back end for one op ("NAME:OP").
    """
    vendors = [name for name in VENDORS if name in options.backends and (device.type == "cuda" or name == "sdpa")]
    ours = [name for name in BACKENDS if name in options.backends]
    if case.op != "model":
        return [*ours, *(name for name in vendors if case.op in VENDORS[name])]
    return [*ours, *(f"{name}:{op}" for name in vendors for op in VENDORS[name] if op != "adam")]


def _word(ok: bool) -> Text:
    return Text("ok") if ok else Text("FAIL", style="red")


def _print(verdicts: list[Verdict], console: Console) -> None:
    table = Table("op", "case", "dtype", "back end", "worst result", "error", "plain PyTorch", "ratio", "", box=None)
    for verdict in verdicts:
        row = [verdict.op, verdict.case, verdict.dtype, verdict.backend]
        if verdict.status == "not run":
            continue
        if verdict.worst is None:
            table.add_row(*row, "-", "-", "-", "-", _word(False))
            continue
        errors = verdict.errors[verdict.worst]
        figures = [f"{errors.rms:.1e}", f"{errors.plain_rms:.1e}", f"{errors.ratio:.2f}"]
        table.add_row(*row, verdict.worst, *figures, _word(verdict.status == "ok"))
    console.print(table)
    for verdict in verdicts:
        if verdict.status == "fail":
            what = f"{verdict.op}, {verdict.case}, {verdict.dtype}, {verdict.backend}"
            console.print(_word(False), f"{what}: {verdict.detail}")
    missing: dict[str, dict[str, str]] = {}  # back end -> op -> why
    for verdict in verdicts:
        if verdict.status == "not run":
            missing.setdefault(verdict.backend, {})[verdict.op] = verdict.detail
    for backend, reasons in missing.items():
        first = next(iter(reasons.values()))
        console.print(f"not run: {backend} for {', '.join(reasons)}. {first}", style="dim", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

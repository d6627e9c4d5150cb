"""`python -m phi_fast.plan --recipe phi-1.5 --gpu H100 --gpus 64`: estimate a run's memory, time and cost.

FLOPs and bytes of every kernel are counted from this project's code, and divided by the rates in the device's data
sheet times a stated efficiency. Every figure is printed with its source. Nothing is measured on a GPU. On a CPU
(`--device cpu`) the machine's own rates are measured first, in a second or two.
"""

from __future__ import annotations

if __name__ == "__main__":
    from phi_fast.startup import begin

    begin("phi_fast.plan", "PyTorch")

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from .config import PhiConfig
from .errors import PhiFastError, UsageError
from .files import check_names
from .kernels import backend
from .option_types import Count
from .planning import show
from .planning.devices import Figure, find_device
from .planning.estimate import Job, Plan, plan
from .planning.host import probe
from .planning.measure import Judged, judge
from .planning.measured import measured_device
from .planning.published import Comparison, compare
from .planning.scaling import Scaling, scaling
from .planning.work import Recompute, Shape
from .precision import Precision, auto_precision
from .recipes import RECIPES, Recipe, RecipeName
from .startup import tolerate_encodings
from .terminal import table_console
from .training import options as training
from .training.options import named

LEVELS: tuple[Recompute, ...] = ("none", "norm_gelu", "all")


@dataclass(frozen=True)
class Options:
    """Plan a run: memory, time and cost of a recipe on a number of devices."""

    recipe: RecipeName | None = None
    """Recipe to plan for. Default: "phi-1.5"; on a CPU "tiny"."""
    config: Path | None = None
    """Plan for the run that this configuration file of `phi_fast.train` describes; options given here override it."""
    device: Literal["gpu", "cpu"] = "gpu"
    """gpu: the GPU named by --gpu. cpu: this machine, whose rates are measured first."""
    gpu: str = "H100"
    """GPU, in upper or lower case: A100-40, A100-80, H100, H200, B200, L40S, RTX-3090, RTX-4090, RTX-5090, MI300X; the
    SXM module if there are several variants. Any other name needs --memory, --flops and --bandwidth."""
    memory: float | None = None
    """Memory of one GPU, GB. Default: from the data sheet."""
    flops: float | None = None
    """Rate of one GPU, dense 16-bit TFLOP/s with fp32 accumulation. Default: from the data sheet."""
    bandwidth: float | None = None
    """Memory bandwidth of one GPU, GB/s. Default: from the data sheet."""
    gpus: int = 8
    """Number of GPUs, in nodes of 8."""
    model: Literal["phi-1.5", "phi-small", "phi-tiny"] | None = None
    """Model to plan for instead of the recipe's, at its full context length."""
    micro_batch_size: int | None = None
    """Rows per device in one forward pass. Default: the largest that fits; on a CPU at most 8."""
    global_batch_size: int | None = None
    """Rows per step. Default: the recipe's."""
    tokens: Count | None = None
    """Tokens to train on. Default: the recipe's."""
    recompute: Recompute = "norm_gelu"
    """The same option as in `phi_fast.train`."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on a GPU, bf16 on a CPU with bf16 instructions, else fp32. GPUs are planned for 16 bits only."""
    price: float | None = None
    """Price of a device hour, in dollars. Default: a round figure per GPU, printed as an assumption."""
    matmul_efficiency: float | None = None
    """Share of the data sheet's FLOP/s that large matrix products reach. Default: a figure per GPU, printed."""
    measured: Path | None = None
    """A results file that `make gpu` wrote: its efficiencies take the place of the assumed ones."""
    measure: bool = False
    """On a CPU, also take real training steps and measure the memory kept for the backward pass."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure to this file."""
    plot: Path | None = None
    """Draw scaling, memory and time into this PNG (needs matplotlib)."""

    def check(self) -> None:
        """Raise UsageError for an invalid option."""
        for name in ("gpus", "micro_batch_size", "global_batch_size", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        if self.price is not None and self.price < 0:
            raise UsageError(f"price={self.price}: must not be negative")
        if self.matmul_efficiency is not None and not 0 < self.matmul_efficiency <= 1:
            raise UsageError(f"matmul_efficiency={self.matmul_efficiency}: must be above 0 and at most 1")
        if self.device == "gpu" and self.precision == "fp32":
            raise UsageError("precision=fp32: GPUs are planned for fp16 and bf16; use one of them, or --device cpu")
        if self.device == "cpu" and self.measured is not None:
            raise UsageError("--measured: a CPU's own rates are measured when the plan is made; leave it out")
        if self.device == "gpu" and self.measure:
            raise UsageError("--measure: only this machine can be measured; add --device cpu, or leave it out")


@dataclass(frozen=True)
class Report:
    """Everything that one call of the command computes."""

    job: Job
    plans: dict[Recompute, Plan]
    """One plan per recompute level, all with the micro-batch size chosen for `job.recompute`."""
    scaling: Scaling | None
    published: list[Comparison]
    judged: Judged | None

    def to_json(self) -> dict[str, Any]:
        """Return every figure, with units in the names, and the sources."""
        recipe, config = self.job.recipe, self.job.recipe.model
        figures = show.sources(self.job.device, self.job.price)
        return {
            "device": self.job.device.name,
            "parameters": config.num_parameters(),
            "flops_per_token_full": recipe.flops_per_token(causal=False),
            "flops_per_token_causal": recipe.flops_per_token(causal=True),
            "recompute": self.job.recompute,
            "plans": {level: asdict(found) for level, found in self.plans.items()},
            "scaling": None if self.scaling is None else asdict(self.scaling),
            "published": [{**asdict(row), "ratio": row.ratio} for row in self.published],
            "measured": None if self.judged is None else asdict(self.judged),
            "assumptions": {name: asdict(figure) for name, figure in figures.items()},
        }


def run(options: Options) -> Report:
    """Compute the report without printing it. Raises UsageError for options that contradict each other."""
    options.check()
    check_names(options)
    recipe = _recipe(options)
    if options.device == "cpu":
        return _cpu_report(options, recipe)
    device = find_device(options.gpu, options.memory, options.flops, options.bandwidth)
    if options.measured is not None:
        device = measured_device(device, options.measured)
    if options.matmul_efficiency is not None:
        stated = Figure(options.matmul_efficiency, "", "--matmul-efficiency")
        device = replace(device, efficiency={**device.efficiency, "product": stated})
    job = Job(
        recipe,
        device,
        options.gpus,
        recompute=options.recompute,
        micro_batch_size=options.micro_batch_size,
        price=options.price,
    )
    comparisons = compare() if recipe.model == RECIPES["phi-1.5"].model else []
    return Report(job, _levels(job), scaling(job), comparisons, None)


def _cpu_report(options: Options, recipe: Recipe) -> Report:
    precision: Precision = auto_precision(torch.device("cpu")) if options.precision == "auto" else options.precision
    batch = recipe.global_batch_size
    rows = options.micro_batch_size or next(size for size in range(min(8, batch), 0, -1) if batch % size == 0)
    inside = backend.rotary_inside("cpu")
    itemsize = 4 if precision == "fp32" else 2
    shape = Shape(
        recipe.model, recipe.sequence_length, rows, itemsize, options.recompute, inside, on_cpu=True, lora=recipe.lora
    )
    job = Job(
        recipe, probe(shape, precision), 1, itemsize, options.recompute, rows, options.price, rotary_inside=inside
    )
    return Report(job, _levels(job), None, [], judge(job, rows, precision) if options.measure else None)


def _recipe(options: Options) -> Recipe:
    recipe: Recipe = RECIPES[options.recipe or ("phi-1.5" if options.device == "gpu" else "tiny")]
    if options.config is not None:
        recipe = _training(options.config, options.recipe)
    if options.model is not None:
        config = PhiConfig.preset(options.model)
        recipe = recipe.replace(model=config, sequence_length=config.max_position_embeddings)
    changes = {name: getattr(options, name) for name in ("global_batch_size", "tokens")}
    return recipe.replace(**{name: value for name, value in changes.items() if value is not None})


def _levels(job: Job) -> dict[Recompute, Plan]:
    """Make one plan per recompute level, all with the micro-batch size of the job's own plan."""
    size = plan(job).micro_batch_size
    return {level: plan(replace(job, recompute=level, micro_batch_size=size)) for level in LEVELS}


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line. Raises UsageError for a file of --config that is not valid."""
    arguments = sys.argv[1:] if arguments is None else arguments
    default = Options()
    if (file := named(arguments, "config")) is not None:
        run = _training(Path(file), None)
        default = replace(
            default, micro_batch_size=run.micro_batch_size, recompute=run.recompute, precision=run.precision
        )
    return tyro.cli(Options, args=arguments, default=default, prog="python -m phi_fast.plan", description=__doc__)


def _training(file: Path, recipe: str | None) -> training.Options:
    """Read the options of `phi_fast.train` from a configuration file; recipe: one that overrides the file's."""
    return training.parse(["--config", str(file), *(["--recipe", recipe] if recipe else [])])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    tolerate_encodings()
    console = table_console(soft_wrap=False)
    try:
        options = parse(arguments)
        if options.device == "cpu" and (problem := backend.isa_problem()):
            raise UsageError(problem)
        report = run(options)
        if options.json_file is not None:
            options.json_file.write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
        if options.plot is not None:
            from .planning.plot import draw

            draw(report.job, report.plans, report.scaling, options.plot)
    except ImportError as error:
        print(f"error: --plot needs matplotlib: pip install 'phi-fast[eval]' ({error})", file=sys.stderr)
        return 2
    except (PhiFastError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(report, console)
    return 0


def _print(report: Report, console: Console) -> None:
    used = report.plans[report.job.recompute]
    show.overview(report.job, used, console)
    console.print()
    show.memory(report.job, report.plans, console)
    console.print()
    if report.scaling is not None:
        show.communication(used, console)
        console.print()
        show.scale(report.scaling, console)
        console.print()
    if report.published:
        show.published(report.published, console)
        console.print()
    if report.judged is not None:
        show.judged(report.judged, console)
        console.print()
    show.assumptions(report.job.device, report.job.price, console)


if __name__ == "__main__":
    sys.exit(main())

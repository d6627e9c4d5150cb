"""The command line of `python -m phi_fast.train`: a recipe, its fields, and the options of the run and the machine."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import tyro

from ..errors import UsageError
from ..files import check_names
from ..json_files import flatten
from ..option_types import Names
from ..recipes import RECIPES, Recipe, RecipeName
from .config_file import OF_ONE_START, overlay, plain, read_config
from .trackers.opening import check_trackers

MUST_AGREE = (
    *("model", "init_from", "implementation", "decay", "optimizer"),
    *("lora_rank", "lora_alpha", "lora_targets"),
    *("mixture", "mixture_stages", "document_isolation", "sequence_length", "global_batch_size", "seed", "tokenizer"),
)
"""Options that a resumed run cannot change, because the model or the order of the data would be different."""


@dataclass(frozen=True)
class Options(Recipe):
    """Train phi on real text under DeepSpeed ZeRO-2.

    The defaults are those of the recipe named by --recipe; every field can be overridden.
    """

    recipe: RecipeName = "tiny"
    """The recipe that sets the other defaults: "tiny", one of the paper's three, or "sft"."""
    config: Path | None = None
    """Read options from a TOML file, or from the config.json of a run; options given here override the file's."""
    print_config: bool = False
    """Print every option as a TOML file for --config, and end."""
    run_dir: Path | None = None
    """Run directory: configuration, metrics, checkpoints. Default: runs/RECIPE, or the next free runs/RECIPE-N."""
    resume: bool = False
    """Go on from the newest complete checkpoint of --run-dir (default: of the newest run of this recipe), with the
    options of that checkpoint except those given here."""
    branch_from: Path | None = None
    """Start a new run at this checkpoint of another run (of a run directory, the newest), with its weights, optimizer
    and place in the data, and its options except those given here. With --schedule wsd and without --tokens, the run
    ends --decay-steps later."""
    allow_change: bool = False
    """Allow a resumed run to change --tokens, the schedule or the optimizer."""
    elastic: bool = False
    """Go on from the newest complete checkpoint of --run-dir if there is one, else start: for launchers and
    schedulers that start the same command again (torchrun --max-restarts, Slurm's requeue)."""
    rank_timeout: float = 600.0
    """Seconds that a rank waits for the others before the run ends with an error."""
    corpora: Names = ()
    """Places of corpora that are not folders of --data, as NAME=FOLDER or NAME=URL. --data may be a URL, too (s3://,
    gs://, http(s)://, hf://)."""
    data_cache: Path | None = None
    """Folder on this machine that caches what is read of remote corpora, for all ranks and runs on it. Default:
    PHI_FAST_DATA_CACHE, else ~/.cache/phi_fast/data."""
    data_cache_gb: float | None = None
    """Largest size of that folder, GB. Default: PHI_FAST_DATA_CACHE_GB, else 50."""
    micro_batch_size: int | None = None
    """Rows per rank in one forward pass. Default: global batch ÷ (ranks × accumulation steps), or at most 8."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per rank and step. Default: global batch ÷ (ranks × micro-batch)."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on CUDA (as in the paper), bf16 on a CPU with bf16 instructions, else fp32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA if torch sees a GPU, else the CPU."""
    implementation: Literal["phi", "reference"] = "phi"
    """phi: the packed parallel block on this project's kernels. reference: plain PyTorch."""
    kernels: str = "auto"
    """Back end for all ops (auto, triton, cpp, reference), then exceptions: "auto,attention=sdpa,adam=reference"."""
    recompute: Literal["none", "norm_gelu", "all"] = "norm_gelu"
    """Activations that the backward pass recomputes instead of keeping: none; the outputs of LayerNorm and GELU; all
    inside a block (activation checkpointing)."""
    zero_step: Literal["fused", "deepspeed"] = "fused"
    """Optimizer step after DeepSpeed has reduced the gradients: this project's fused pass, or DeepSpeed's own."""
    reduce_gradients: Literal["auto", "step", "micro-batch"] = "auto"
    """How often several ranks reduce gradients: once per step, which takes 4 bytes per parameter on each, or after each
    micro-batch. auto: once per step where that is at most a tenth of the GPU's memory."""
    cuda_graphs: bool = False
    """Replay forward and backward of each micro-batch from a CUDA graph, with one launch by the host
    (docs/at-scale.md)."""
    val_every: int = 100
    """Steps between validation losses, also measured before the first and after the last step; 0: never."""
    val_rows: int = 32
    """Validation rows per corpus, from the start of its validation split."""
    eval_every: int = 0
    """Steps between scores on --eval-tasks, also measured after the last step; 0: never. The other ranks wait for rank
    0, at most --rank-timeout."""
    eval_tasks: Names = ("arc_easy", "piqa", "winogrande")
    """Multiple-choice tasks of the report (docs/evaluation.md)."""
    eval_data: Path | None = None
    """Folder with the questions in files TASK.jsonl. Default: the data sets of the Hugging Face hub."""
    eval_limit: int = 100
    """Number of questions per task, taken from the start of each."""
    save_every: int = 0
    """Steps between checkpoints; one is always saved at the end and at a stop. 0: none by steps."""
    save_minutes: float = 30.0
    """Minutes between checkpoints, in addition to --save-every; 0: none by time."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Keep the checkpoints of all steps divisible by this number; 0: none."""
    log_every: int = 10
    """Steps between printed lines if the output is not a terminal; metrics.jsonl has every step."""
    track: Names = ()
    """Also show the run in wandb, trackio, mlflow, or several; TensorBoard's events are always written."""
    log_norms: int = 0
    """Steps between lines of norms.jsonl: the norms of each parameter's weights, gradient and update; 0: none."""
    profile: str | None = None
    """Trace the steps FROM:TO (both included) for Perfetto, with a snapshot of the GPU's memory, into RUN/profile."""
    sample_tokens: int = 120
    """Length of the text sampled at the end, in tokens; 0: none."""
    sample_prompt: str = "The"
    """Prompt of the sampled text."""
    stop_after: int | None = None
    """Save and stop after this many steps of this start; for schedulers with time slots."""

    def check(self) -> None:
        """Check the recipe's fields and the trainer's own."""
        super().check()
        check_names(self)
        if self.recipe == "sft" and self.init_from is None:
            raise UsageError("--recipe sft trains a model further: name its weights with --init-from")
        if not 0 < self.rank_timeout <= 1e9:
            raise UsageError(f"rank_timeout={self.rank_timeout}: must be seconds, greater than 0 and at most 1e9")
        if not 0 <= self.save_minutes < math.inf:
            raise UsageError(f"save_minutes={self.save_minutes}: must be minutes, at least 0 (0: never)")
        for name in ("val_rows", "eval_limit", "log_every", "stop_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        for name in ("val_every", "eval_every", "save_every", "keep_last", "keep_every", "log_norms", "sample_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)}: must not be negative")
        if unknown := named_places(self.corpora).keys() - self.mixture.keys():
            raise UsageError(f"--corpora names {', '.join(sorted(unknown))}, the mixture has {', '.join(self.mixture)}")
        if self.data_cache_gb is not None and not 0 < self.data_cache_gb < math.inf:
            raise UsageError(f"data_cache_gb={self.data_cache_gb}: must be gigabytes, greater than 0")
        self._require_fused()
        check_trackers(self.track)
        if self.profile is not None:
            profiled_steps(self.profile)
        if self.lora_rank is not None and self.implementation == "reference":
            raise UsageError("--lora-rank needs --implementation phi: the reference has no adapters")
        if self.lora_rank is not None and self.ema_decay is not None:
            raise UsageError("--lora-rank and --ema-decay: no average of adapters is kept; leave one of them out")
        if self.lora_rank is not None and self.optimizer == "muon":
            raise UsageError("--lora-rank and --optimizer muon: adapters are trained by Adam; leave one of them out")
        if self.cuda_graphs and self.document_isolation:
            raise UsageError(
                "--cuda-graphs and --document-isolation: a graph has fixed shapes, but the number of documents differs "
                "from batch to batch; leave one of them out"
            )

    def _require_fused(self) -> None:
        """Raise UsageError for an option that DeepSpeed's own step cannot do."""
        asked = (
            ("--skip-spikes", self.skip_spikes, "cannot leave an update out"),
            ("--skip-norm-spikes", self.skip_norm_spikes, "cannot leave an update out"),
            ("--ema-decay", self.ema_decay is not None, "does not say what it skipped"),
            ("--optimizer muon", self.optimizer == "muon", "has Adam alone here"),
            ("--log-norms", self.log_norms, "does not show its gradients"),
            ("--reduce-gradients step", self.reduce_gradients == "step", "reduces each time"),
            ("--cuda-graphs", self.cuda_graphs, "needs DeepSpeed's hooks"),
        )
        for option, given, why in asked:
            if given and self.zero_step == "deepspeed":
                raise UsageError(f"{option} needs --zero-step fused: DeepSpeed's own step {why}")

    def recipe_fields(self) -> dict[str, Any]:
        """Return the recipe's fields, which determine the losses, JSON-able."""
        names = {field.name for field in fields(Recipe)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k in names}

    def tracked(self) -> dict[str, Any]:
        """Return the options that outlive a single start by dotted name, JSON-able."""
        return flatten({name: value for name, value in plain(asdict(self)).items() if name not in OF_ONE_START})


def parse(arguments: Sequence[str], default: Options | None = None) -> Options:
    """Parse the command line and the file that --config names; exits with status 2 and a message if it is not valid.

    default: values of the options that neither gives; None: the recipe's.
    Raises UsageError for a file that cannot be read or holds what is not an option.
    """
    arguments = [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]  # deepspeed's launcher
    base = default or defaults(arguments)
    default = overlay(base, from_file(arguments), str(named(arguments, "config")))
    options = tyro.cli(
        Options, args=arguments, default=default, prog="python -m phi_fast.train", config=(tyro.conf.AvoidSubcommands,)
    )
    return _of_one_length(options, base)


def _of_one_length(options: Options, default: Options) -> Options:
    """Let --tokens or --epochs, whichever was given, replace the default of the other. UsageError if both were."""
    by_tokens, by_epochs = options.tokens != default.tokens, options.epochs != default.epochs
    if by_tokens and by_epochs and options.tokens is not None and options.epochs is not None:
        raise UsageError(
            f"--tokens {options.tokens} and --epochs {options.epochs} both set the length: give one of them"
        )
    if by_tokens:
        return replace(options, epochs=None)
    return replace(options, tokens=None) if by_epochs else options


def defaults(arguments: Sequence[str]) -> Options:
    """Return the options of the recipe that the command line or the file of --config names."""
    name = named(arguments, "recipe") or from_file(arguments).get("recipe")
    name = cast(RecipeName, name if name in RECIPES else "tiny")  # tyro itself refuses a bad one
    return Options(recipe=name, **{field.name: getattr(RECIPES[name], field.name) for field in fields(Recipe)})


def named(arguments: Sequence[str], option: str) -> str | None:
    """Find the value of an option that sets other options' defaults, and so is read before tyro parses them all."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name.replace("_", "-") == f"--{option}":
            value = text if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return value


def from_file(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the options that the file of --config sets; none without one. Raises as `config_file.read_config` does."""
    file = named(arguments, "config")
    return {} if file is None else read_config(Path(file), Options)


def plan_batch(options: Options, ranks: int) -> tuple[int, int]:
    """Choose (micro-batch size, accumulation steps) for the global batch on `ranks`; UsageError if none fit."""
    batch, micro, steps = options.global_batch_size, options.micro_batch_size, options.gradient_accumulation_steps
    for name, value in (("micro_batch_size", micro), ("gradient_accumulation_steps", steps)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: must be at least 1")
    if batch % ranks:
        raise UsageError(
            f"global_batch_size={batch} rows cannot be shared out over {ranks} ranks; use --global-batch-size "
            f"{batch + ranks - batch % ranks}, or a number of ranks that divides {batch}"
        )
    rows = batch // ranks
    if micro is None:
        micro = rows // steps if steps else next(size for size in range(min(8, rows), 0, -1) if rows % size == 0)
    steps = steps or max(1, rows // micro)
    if micro * steps * ranks != batch:
        raise UsageError(
            f"micro_batch_size={micro} × ranks={ranks} × gradient_accumulation_steps={steps} = {micro * steps * ranks} "
            f"rows, but global_batch_size={batch}; change one of them so that the product is {batch}"
        )
    return micro, steps


def named_places(entries: Sequence[str]) -> dict[str, Path]:
    """Parse the entries NAME=PLACE of --corpora. Raises UsageError for anything else, and for a name given twice."""
    places: dict[str, Path] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        if not (name and equals and place):
            raise UsageError(f"--corpora {entry}: expected NAME=FOLDER or NAME=URL, as in web=s3://bucket/web")
        if name in places:
            raise UsageError(f"--corpora names {name!r} twice")
        places[name] = Path(place)
    return places


def profiled_steps(text: str) -> range:
    """Parse FROM:TO, both included, counted from 1. Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text, re.ASCII)
    steps = range(int(match[1]), int(match[2]) + 1) if match else range(0)
    if not steps or steps[0] < 1:
        raise UsageError(f"--profile {text}: expected FROM:TO, two steps counted from 1, such as 10:12")
    return steps

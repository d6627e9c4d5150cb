"""Resuming a run with its own options: which options --resume takes over, and which may be changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..conversion.source import Source
from ..errors import UsageError
from ..json_files import Fields, read_object, read_regular
from ..recipes import Recipe
from .config_file import OF_ONE_START, ConfigFileError, overlay, plain, typed
from .initial import parse_on
from .options import MUST_AGREE, Options, from_file, named, parse
from .ownership import newest_run

AS_IT_GOES = (
    *("skip_spikes", "skip_norm_spikes", "gradient_clipping", "initial_loss_scale"),
    *("loss_scale_window", "loss_scale_hysteresis", "min_loss_scale"),
)
"""Options of the recipe that a resume may change without --allow-change. So may a constant learning rate."""


def parse_command(arguments: Sequence[str]) -> Options:
    """Parse the command line; with --resume, options that are not given are those of the run's newest checkpoint.

    With --branch-from they are those of that checkpoint. Raises UsageError if there is no run to resume or to branch
    from.
    """
    file = from_file(arguments)
    resumes = "--resume" in arguments or file.get("resume")
    branch_from = named(arguments, "branch-from") or file.get("branch_from")
    if branch_from is not None and not resumes:
        return _branched(arguments, file, Path(branch_from))
    init_from = named(arguments, "init-from") or file.get("init_from")
    if init_from is not None and not resumes:
        return _of_initial_shape(arguments, file, init_from)
    options = parse(arguments)
    if not options.resume:
        return options
    directory = newest_run(options)
    saved = saved_options(directory)
    if saved is not None and (saved.recipe == options.recipe or named(arguments, "recipe") is None):
        options = parse(arguments, saved)
    return replace(options, run_dir=directory)


def _branched(arguments: Sequence[str], file: dict[str, Any], branch_from: Path) -> Options:
    """Parse the command line of a new run that starts at a checkpoint, with that checkpoint's options as the default.

    An --elastic start that goes on from a checkpoint of its own does not need the other any more.
    Raises UsageError if there is no such checkpoint.
    """
    before = _before(arguments, file)
    if before is not None and before.branch_from is not None:
        return replace(parse(arguments, before), branch_from=before.branch_from)
    source = _checkpoint(branch_from)
    found = read_object(source / "state.json", way_out="Name another checkpoint")
    saved, step = _options(found.inner("options")), found.whole("step")
    options = replace(parse(arguments, replace(saved, branch_from=source)), branch_from=source)
    if options.resume:
        raise UsageError("--branch-from starts a new run, and --resume goes on with one: leave one of them out")
    same_end = named(arguments, "tokens") is None and options.tokens == saved.tokens
    if options.schedule == "wsd" and same_end:
        options = replace(options, tokens=(step + options.decay_steps) * options.tokens_per_step)
    return options


def _checkpoint(path: Path) -> Path:
    """Return a checkpoint's folder: `path` itself, or the newest one of the run `path`."""
    pointer = path / "checkpoints" / "latest"
    if pointer.is_file():
        path = pointer.with_name(read_regular(pointer, 100).decode(errors="replace"))
    if not (path / "state.json").is_file():
        raise UsageError(
            f"--branch-from {path} is not a checkpoint: name a folder such as runs/tiny/checkpoints/step-100, or a run"
        )
    return path


def _of_initial_shape(arguments: Sequence[str], file: dict[str, Any], init_from: str) -> Options:
    """Parse the command line of a run that starts from weights, whose shape they set; see `initial.parse_on`.

    An --elastic start that goes on from a checkpoint does not need those weights any more.
    """
    before = _before(arguments, file)
    if before is not None and before.init_from == init_from:
        return parse_on(before.model, arguments, init_from)
    return parse_on(Source.open(init_from).config, arguments, init_from)


def _before(arguments: Sequence[str], file: dict[str, Any]) -> Options | None:
    """Return the options of the run that an --elastic start may go on with; None for another start or a first one."""
    run = named(arguments, "run-dir") or file.get("run_dir")
    elastic = "--elastic" in arguments or file.get("elastic")
    return saved_options(Path(run)) if run is not None and elastic else None


def saved_options(directory: Path) -> Options | None:
    """Read the options of a run's newest checkpoint, or else of its config.json; None if neither exists.

    The checkpoint comes first, because config.json may come from a later start that failed.
    Raises JsonFileError for files that hold no options.
    """
    way_out = "Give all options of the run, or resume an undamaged copy of it"
    pointer = directory / "checkpoints" / "latest"
    try:
        name = pointer.read_text(encoding="utf-8")[:100] if pointer.is_file() else "none"
        found = read_object(pointer.with_name(name) / "state.json", way_out=way_out).inner("options")
    except (OSError, ValueError):  # `checkpoint.newest` will say what is wrong with this checkpoint
        try:
            found = read_object(directory / "config.json", way_out=way_out)
        except OSError:
            return None
    return _options(found)


def _options(found: Fields) -> Options:
    known = {field.name for field in fields(Options)} - {*OF_ONE_START}
    found.inner("model")  # without it the model would be the default one
    try:
        values = typed(Options, {name: value for name, value in found.values.items() if name in known}, found.where)
        return overlay(Options(), values, found.where)
    except ConfigFileError as error:
        raise UsageError(f"{found.where} does not hold a run's options ({error}). {found.way_out}") from None


def changes(then: dict[str, Any], options: Options, step: int) -> list[str]:
    """Describe, in one line each, the recipe's fields that differ from `then`, the options of the checkpoint.

    Raises UsageError for a field that needs --allow-change, unless that is given.
    """
    before, now = then, plain(asdict(options))
    names = [field.name for field in fields(Recipe) if field.name not in (*MUST_AGREE, "data")]
    lines = {
        name: f"{name} was {before[name]}, is now {now[name]}"
        for name in names
        if name in before and before[name] != now[name]
    }
    free = {*AS_IT_GOES}
    if options.schedule == then["schedule"] == "constant":
        free |= {"learning_rate", "final_learning_rate"}
        free |= {"warmup_steps"} if step >= max(then["warmup_steps"], options.warmup_steps) else set()
    other = [line for name, line in lines.items() if name not in free]
    if other and not options.allow_change:
        raise UsageError(
            f"this would change the run from step {step} on: {'; '.join(other)}. Leave the option out to go on as "
            "before, or add --allow-change"
        )
    return list(lines.values())

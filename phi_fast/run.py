"""A run directory: which one, what is saved in it, and going on from it.

config.json       the options it was started with
metrics.jsonl     a line a step
checkpoints/      see phi_fast.checkpoint
tensorboard/
tokenizer.json    so that the directory alone is enough to generate text; tokenizer_config.json names the tokens that
                  begin and end one
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint
from .checkpoint import CheckpointError, Saver, Snapshot
from .data import TokenLoader
from .data.vocabulary import TokenIds
from .distributed import World
from .errors import UsageError
from .files import write_atomically, writing
from .options import Options
from .zero import Zero2

MUST_AGREE = (
    *("model", "implementation", "decay"),
    *("mixture", "sequence_length", "global_batch_size", "seed", "tokenizer"),
)
"""Options that a resumed run cannot change: the checkpoint would be of another model, or the data order another."""


class Run:
    """An open run directory."""

    def __init__(self, directory: Path, options: Options, world: World, source: Path | None) -> None:
        self.directory, self.options, self.world = directory, options, world
        self.source = source
        """The checkpoint to go on from, or None."""
        self._saver: Saver | None = None

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @staticmethod
    def open(options: Options, world: World, console: Console) -> Run:
        """Choose the directory, the same on every rank; nothing is written yet.

        Raises UsageError where there is nothing to resume, or a named directory holds another run; CheckpointError
        where the newest complete checkpoint is of another model or data order.
        """
        choice = world.broadcast(_choose(options) if world.is_main else None)
        if isinstance(choice, str):
            raise UsageError(choice)
        source = None
        if options.resume or options.elastic:
            source, skipped = checkpoint.newest(choice / "checkpoints", world)
            for line in skipped:
                console.print(line, style="yellow")
            if source is None and (options.resume or skipped):
                flag = "--resume" if options.resume else "--elastic"
                raise UsageError(
                    f"{flag}: {choice / 'checkpoints'} has no complete checkpoint; start without {flag}, in another "
                    "--run-dir"
                )
        run = Run(choice, options, world, source)
        if source is not None:
            differ = _differences(checkpoint.load_state(source), options)
            run.refuse("; ".join(differ), lambda state: not _differences(state, options))
        return run

    def refuse(self, reason: str, fits: Callable[[dict[str, Any]], bool]) -> None:
        """Where there is a `reason` why `source` is not of this run: CheckpointError, naming the newest that `fits`."""
        if not reason:
            return
        other, _ = checkpoint.newest(self.checkpoints, self.world, fits=fits)
        way_out = (
            f"{other} is complete and of this run: to go on from it, move {self.source} away"
            if other
            else "Give the options and corpora it was started with, or start a new run in another --run-dir"
        )
        raise CheckpointError(f"{self.source} is of another run: {reason}. {way_out}")

    def create(self, tokenizer: Tokenizer) -> None:
        """Make the directory, with the options and the tokenizer in it: once nothing but training can go wrong."""
        if not self.world.is_main:
            return
        model = self.options.model
        ids = TokenIds(model.bos_token_id, model.eos_token_id, model.eos_token_id)
        tokenizer_config = ids.config(tokenizer, model.max_position_embeddings)
        files = {
            "config.json": json.dumps(_plain(asdict(self.options)), indent=1),
            "tokenizer.json": tokenizer.to_str(True),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
        }
        with writing(self.directory, "make room or give the right to, or name another --run-dir"):
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():  # a resume cannot leave half of what was whole
                write_atomically(self.directory / name, text.encode())

    def save(self, zero: Zero2, loader: TokenLoader, step: int) -> Path:
        """Begin a checkpoint of every rank and return where it will be; see `checkpoint.Saver`."""
        if self._saver is None:
            kept = {"keep_last": self.options.keep_last, "keep_every": self.options.keep_every}
            self._saver = Saver(self.checkpoints, self.world, **kept)
        state = {
            "step": step,
            "options": _plain(asdict(self.options)),
            "zero": zero.state_dict(),
            "sizes": {name: whole for name, (_, whole) in zero.partition_sizes().items()},
            "data": loader.state_dict(),
        }
        weights: dict[str, Tensor] = dict(zero.model.named_parameters())
        return self._saver.save(Snapshot(state, weights, zero.partitions(), checked=zero.fused is not None))

    @property
    def save_failed(self) -> bool:
        """A save in the background failed on this rank: `wait` says how."""
        return self._saver is not None and self._saver.failed

    def wait(self) -> None:
        """Until the checkpoint in flight is written; raises CheckpointError where it could not be."""
        if self._saver is not None:
            self._saver.wait()

    def last_checkpoint(self) -> Path | None:
        """The newest that is written, once the one in flight is."""
        self.wait()
        pointer = self.checkpoints / "latest"
        return self.checkpoints / pointer.read_text(encoding="utf-8") if pointer.exists() else None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the checkpoint in flight; its own failure does not hide the error that ends the run."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise

    def restore(self, zero: Zero2, loader: TokenLoader, console: Console) -> int:
        """Take up `source`, if there is one; returns the steps already done."""
        if self.source is None:
            return 0
        state = checkpoint.load_state(self.source)
        here = {name: whole for name, (_, whole) in zero.partition_sizes().items()}
        differ = [
            f"{name} has {state['sizes'].get(name)} elements, now {here.get(name)}"
            for name in {**here, **state["sizes"]}
            if here.get(name) != state["sizes"].get(name)
        ]
        self.refuse("; ".join(differ), lambda state: state["sizes"] == here)
        try:
            loader.load_state_dict(state["data"])
        except ValueError as error:
            corpora = loader.state_dict()["corpora"]
            self.refuse(str(error), lambda state: state["data"]["corpora"] == corpora)
        partitions = checkpoint.load_partitions(self.source, zero.partition_sizes(), self.world)
        zero.load(checkpoint.load_model(self.source), partitions, state["zero"])
        checkpoint.restore_random_states(self.source, self.world)
        console.print(f"resumed from {self.source}")
        return state["step"]


def _choose(options: Options) -> Path | str:
    """The run directory, or the error that says why there is none."""
    base = options.run_dir or Path("runs") / options.recipe
    if options.run_dir is not None:
        if not (options.resume or options.elastic) and (base / "checkpoints").exists():
            return f"--run-dir {base} already holds checkpoints; add --resume to go on, or name another directory"
        return base
    if options.elastic:
        return "--elastic starts the same command again and again: name its directory with --run-dir"
    numbered = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 10_000))]
    taken = [path for path in numbered if path.exists()]
    if options.resume:
        with_checkpoints = [path for path in taken if (path / "checkpoints").exists()]
        if not with_checkpoints:
            return f"--resume: there is no run with checkpoints at {base}; name one with --run-dir, or drop --resume"
        return max(with_checkpoints, key=lambda path: (path / "checkpoints").stat().st_mtime)
    return next(path for path in numbered if not path.exists())


def _differences(state: dict[str, Any], options: Options) -> list[str]:
    """What makes a checkpoint's state.json one of another model or data order: each field with both values."""
    now, then = (_less_token_ids(fields) for fields in (_plain(asdict(options)), state["options"]))
    return [f"{name} is {then[name]}, now {now[name]}" for name in MUST_AGREE if then[name] != now[name]]


def _less_token_ids(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the ids that come from the tokenizer, which must agree by itself."""
    model = {name: value for name, value in options["model"].items() if not name.endswith("_token_id")}
    return {**options, "model": model}


def _plain(value: Any) -> Any:
    """JSON-able."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

"""A run directory: its files, saving into it, and resuming from it.

config.json       the options of the latest start
metrics.jsonl     one line per step
checkpoints/      see phi_fast.training.checkpoint
tensorboard/
norms.jsonl       with --log-norms; profile/ with --profile; tracked.json and report.html with --track
tokenizer.json    the tokenizer, so that the directory alone is enough to generate text; tokenizer_config.json names the
                  tokens that begin and end a text
chat_template.jinja  the chat template of the run's conversations, if it has any
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from ..conversion.adapter import peft_config, peft_name
from ..conversion.source import Source
from ..data import TokenLoader
from ..data.chat import TEMPLATE_FILE, ChatFiles
from ..data.vocabulary import TokenIds
from ..errors import UsageError
from ..files import write_atomically, writing
from . import checkpoint
from .checkpoint import CheckpointError, Saver, Snapshot
from .config_file import plain
from .distributed import World
from .initial import open_initial
from .options import MUST_AGREE, Options
from .ownership import WAY_OUT, Owned
from .parameters import trained_weights
from .resuming import changes
from .zero import Zero2


class Run:
    """An open run directory."""

    def __init__(self, directory: Path, options: Options, world: World, owned: Owned | None) -> None:
        self.directory, self.options, self.world = directory, options, world
        self._owned = owned
        self.source: Path | None = None
        """The checkpoint to resume from, or None."""
        self.base: dict[str, str] | None = None
        """With --lora-rank, where the frozen weights are ("name") and a hash of their files ("sha256")."""
        self._saver: Saver | None = None
        self._saved_at = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @staticmethod
    def open(options: Options, world: World, console: Console) -> Run:
        """Choose the directory, the same on every rank, and lock it; no file of the run is written yet.

        Raises UsageError if there is nothing to resume, or the directory holds another run or is in use;
        CheckpointError if the newest complete checkpoint belongs to another model or data order.
        """
        owned, choice = _own(options, console) if world.is_main else (None, None)
        choice = world.broadcast(choice)
        if isinstance(choice, str):
            raise UsageError(choice)
        run = Run(choice, options, world, owned)
        try:
            run._find_source(console)
        except BaseException:
            run.close()
            raise
        return run

    def _find_source(self, console: Console) -> None:
        """Set `source` to the newest complete checkpoint, if the options ask to resume, or else to --branch-from."""
        options = self.options
        if options.resume or options.elastic:
            self._find_newest(console)
        if self.source is None and options.branch_from is not None:
            checkpoint.require_complete(options.branch_from, self.world)
            self.source = options.branch_from
            differ = _differences(checkpoint.load_state(self.source), options)
            self.refuse("; ".join(differ), lambda state: not _differences(state, options))

    def _find_newest(self, console: Console) -> None:
        options = self.options
        self.source, skipped = checkpoint.newest(self.checkpoints, self.world)
        for line in skipped:
            console.print(line, style="yellow")
        if self.source is not None:
            differ = _differences(checkpoint.load_state(self.source), options)
            self.refuse("; ".join(differ), lambda state: not _differences(state, options))
        elif options.resume or skipped:
            flag = "--resume" if options.resume else "--elastic"
            raise UsageError(
                f"{flag}: {self.checkpoints} has no complete checkpoint; start without {flag}, in another --run-dir"
            )

    def refuse(self, reason: str, fits: Callable[[dict[str, Any]], bool]) -> None:
        """Raise CheckpointError if there is a `reason` to refuse `source`; the message names the newest that `fits`."""
        if not reason:
            return
        other, _ = checkpoint.newest(self.checkpoints, self.world, fits=fits)
        way_out = (
            f"{other} is complete and belongs to this run: to go on from it, move {self.source} away"
            if other
            else "Give the options and corpora it was started with, or start a new run in another --run-dir"
        )
        raise CheckpointError(f"{self.source} belongs to another run: {reason}. {way_out}")

    def open_initial(self, tokenizer: Tokenizer, console: Console) -> Source | None:
        """Open the weights that the model is built from: a start's, and every time the frozen ones of --lora-rank.

        Raises as `initial.open_initial` does, and CheckpointError if the frozen weights are not those that the
        adapters in `source` were trained on.
        """
        options, base = self.options, None
        if options.lora is None:
            return None if self.source else open_initial(options, tokenizer, console)
        if self.source:
            base = checkpoint.load_state(self.source)["base"]
        opened = open_initial(options, tokenizer, console, base and base["name"])
        assert opened is not None  # Options.check: --lora-rank needs --init-from
        given = str(options.init_from)
        name = base["name"] if base else str(opened.folder.absolute()) if Path(given).exists() else given
        digest = self.world.broadcast(opened.digest() if self.world.is_main else None)
        self.base = {"name": name, "sha256": digest}
        if base and base != self.base:
            raise CheckpointError(
                f"{self.source} has adapters of other weights than {name} now holds (their SHA-256 differs): put those "
                "back, or start a new run in another --run-dir"
            )
        return opened

    def create(self, tokenizer: Tokenizer, checkpoint_bytes: int, chat: ChatFiles | None = None) -> None:
        """Write the options and the tokenizer, after everything that training needs has been created and checked.

        chat: the chat template of the run's conversations, and its special tokens.
        Raises UsageError if they cannot be written, and on every rank if there is no room for one checkpoint.
        """
        problem = self._refuse_a_full_disk(checkpoint_bytes) if self.world.is_main else None
        if problem := self.world.broadcast(problem):
            raise UsageError(problem)
        if not self.world.is_main:
            return
        model = self.options.model
        ids = TokenIds(model.bos_token_id, model.eos_token_id, model.eos_token_id)
        tokenizer_config = ids.config(tokenizer, model.max_position_embeddings)
        files = {
            "config.json": json.dumps(plain(asdict(self.options)), indent=1),
            "tokenizer.json": tokenizer.to_str(True),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
        }
        if chat is not None:
            files["tokenizer_config.json"] = json.dumps(tokenizer_config | chat.names, indent=2)
            files[TEMPLATE_FILE] = chat.template
        with writing(self.directory, WAY_OUT):
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():  # atomically: a failing resume must not damage the existing files
                write_atomically(self.directory / name, text.encode())
        if self._owned is not None:
            self._owned.keep()

    def _refuse_a_full_disk(self, checkpoint_bytes: int) -> str | None:
        """Return why there is no room for one more checkpoint, or None. Old ones are removed only after a new one."""
        free = shutil.disk_usage(self.directory).free
        if free >= checkpoint_bytes:
            return None
        return (
            f"{self.directory} has {free / 1e9:.2f} GB of room, and a checkpoint of this run takes "
            f"{checkpoint_bytes / 1e9:.2f} GB: make room, or name a --run-dir on another file system"
        )

    def save(self, zero: Zero2, loader: TokenLoader, step: int) -> Path:
        """Begin to save a checkpoint, on every rank, and return its path; see `checkpoint.Saver`.

        The data position is computed from `step`, because the loader may already have given out rows of later steps.
        """
        self._saved_at = time.monotonic()
        if self._saver is None:
            kept = {"keep_last": self.options.keep_last, "keep_every": self.options.keep_every}
            self._saver = Saver(self.checkpoints, self.world, **kept)
        state = {
            "step": step,
            "options": plain(asdict(self.options)),
            "zero": zero.state_dict(),
            "sizes": {name: whole for name, (_, whole) in zero.partition_sizes().items()},
            "data": {**loader.state_dict(), "row": step * self.options.global_batch_size},
        }
        weights: dict[str, Tensor] = dict(trained_weights(zero.model))
        adapter = None
        if self.base is not None and self.options.lora is not None:
            state["base"] = self.base
            adapter = peft_config(self.options.lora, self.base["name"])
            weights = {peft_name(name): tensor for name, tensor in weights.items()}
        snapshot = Snapshot(state, weights, zero.partitions(), adapter, checked=zero.fused is not None)
        return self._saver.save(snapshot)

    @property
    def save_failed(self) -> bool:
        """True if a save in the background failed on this rank; `wait` raises its error."""
        return self._saver is not None and self._saver.failed

    def wait(self) -> None:
        """Wait until the checkpoint in flight is written; raises CheckpointError if it could not be."""
        if self._saver is not None:
            self._saver.wait()

    def last_checkpoint(self) -> Path | None:
        """Wait for the checkpoint in flight, and return the newest; None if there is none."""
        self.wait()
        pointer = self.checkpoints / "latest"
        return self.checkpoints / pointer.read_text(encoding="utf-8") if pointer.exists() else None

    @property
    def save_due(self) -> bool:
        """True on rank 0 if the last save began more than --save-minutes ago."""
        minutes = self.options.save_minutes
        return self.world.is_main and minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def close(self) -> None:
        """Unlock the directory, and remove it if it was made for a run that did not begin."""
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the checkpoint in flight, and close. A failed save does not hide the error that ended the run."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self.close()

    def restore(self, zero: Zero2, loader: TokenLoader, console: Console) -> int:
        """Restore the state from `source`, if there is one; returns the number of steps already done."""
        if self.source is None:
            return 0
        state = checkpoint.load_state(self.source)
        wanted = zero.partition_sizes()
        here, there = _less_average({name: whole for name, (_, whole) in wanted.items()}), _less_average(state["sizes"])
        differ = [
            f"{name} has {there.get(name)} elements, now {here.get(name)}"
            for name in {**here, **there}
            if here.get(name) != there.get(name)
        ]
        self.refuse("; ".join(differ), lambda state: _less_average(state["sizes"]) == here)
        try:
            loader.load_state_dict(state["data"])
        except ValueError as error:
            corpora = loader.state_dict()["corpora"]
            self.refuse(str(error), lambda state: state["data"]["corpora"] == corpora)
        saved = {name: size for name, size in wanted.items() if name in state["sizes"]}
        partitions = checkpoint.load_partitions(self.source, saved, self.world)
        weights = checkpoint.load_model(self.source)
        if self.options.lora is not None:
            weights = {name: weights[peft_name(name)] for name in trained_weights(zero.model)}
        zero.load(weights, partitions, state["zero"])
        checkpoint.restore_random_states(self.source, self.world)
        branched = self.source.parent.resolve() != self.checkpoints.resolve()
        console.print(f"{'branched' if branched else 'resumed'} from {self.source}")
        options = replace(self.options, allow_change=branched or self.options.allow_change)
        for line in changes(state["options"], options, state["step"]):
            console.print(line)
        return state["step"]


def _own(options: Options, console: Console) -> tuple[Owned | None, Path | str]:
    """Lock the directory; returns it, or the message of the UsageError that every rank is to raise."""
    try:
        owned = Owned.choose(options, console.print)
    except UsageError as error:
        return None, str(error)
    return owned, owned.directory


def _differences(state: dict[str, Any], options: Options) -> list[str]:
    """Describe each option of `MUST_AGREE` that differs from a checkpoint's state.json, with both values."""
    # An option that is missing in the checkpoint had its default value.
    state_options = {**plain({name: getattr(Options, name, None) for name in MUST_AGREE}), **state["options"]}
    now, then = (_less_token_ids(fields) for fields in (plain(asdict(options)), state_options))
    return [f"{name} is {then[name]}, now {now[name]}" for name in MUST_AGREE if then[name] != now[name]]


def _less_average(sizes: dict[str, int]) -> dict[str, int]:
    """Remove the average of the weights, which a run may begin or end to keep (`--ema-decay`)."""
    return {name: size for name, size in sizes.items() if not name.startswith("ema.")}


def _less_token_ids(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the token ids from the options: they come from the tokenizer, which is compared itself."""
    model = {name: value for name, value in options["model"].items() if not name.endswith("_token_id")}
    return {**options, "model": model}

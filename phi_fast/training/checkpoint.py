"""Checkpoints that a crash at any moment cannot corrupt.

A checkpoint is written into a temporary folder, synced, listed in a manifest with sizes and SHA-256, and renamed; then
`latest` is replaced. So a folder named `step-N` is complete or was damaged later, and the manifest tells which. `Saver`
does this while training goes on: it copies the tensors to host memory, and a thread writes them.

    checkpoints/
      latest                         "step-400"
      step-400/
        manifest.json                sizes and hashes of the files below, and its own hash; written last
        state.json                   step, configuration, data position, loss scale
        model.safetensors            weights as the model uses them, by parameter name; with --lora-rank instead
                                     adapter_model.safetensors and adapter_config.json, as PEFT has them
        rank-0-of-2.safetensors      fp32 master, exp_avg, exp_avg_sq and, with --ema-decay, ema: this rank's flat ZeRO
                                     partition of each group
        rank-0-of-2.json             this rank's random states of Python, NumPy and torch

Files are safetensors and JSON only: no pickle is read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..conversion.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..errors import PhiFastError
from ..files import sha256_of, sync_directory, sync_file
from ..json_files import Fields, JsonFileError, read_object
from .distributed import World

FORMAT = 2
MODEL_FILES = {"model.safetensors"}
ADAPTER_FILES = {WEIGHTS_FILE, CONFIG_FILE}
_NAME = re.compile(r"step-(\d+)")


class CheckpointError(PhiFastError, RuntimeError):
    """A checkpoint could not be written or read; the message names the file and what to do."""


@dataclass
class Snapshot:
    """The part of a checkpoint that one rank writes."""

    state: dict[str, Any]
    """Content of state.json; the same on every rank."""
    model: dict[str, Tensor]
    """Weights by parameter name; the same on every rank."""
    partitions: dict[str, Tensor]
    """This rank's flat partition of each optimizer tensor, e.g. "master.0"; 1-D."""
    adapter: dict[str, Any] | None = None
    """Content of adapter_config.json, if `model` holds adapters, under PEFT's names."""
    random_states: dict[str, Any] = field(default_factory=lambda: random_states())
    """This rank's random states, JSON-able."""
    checked: bool = False
    """True if all weights and optimizer tensors are known to be finite; otherwise `save` checks each."""

    def on_host(self, world: World) -> Snapshot:
        """Copy what this rank writes to host memory, so that training can go on."""
        weights = self.model if world.is_main else {}
        model, partitions = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (weights, self.partitions)
        )
        return replace(self, model=model, partitions=partitions)


class Saver:
    """Saves in the background: `save` copies the snapshot and returns, a thread writes it; one save at a time.

    Every rank creates a Saver and makes the same calls. A failed save raises CheckpointError at the next `save` or
    `wait`, on every rank; `failed` is true before that.
    """

    def __init__(self, directory: Path, world: World, *, keep_last: int, keep_every: int = 0) -> None:
        self.directory, self.keep_last, self.keep_every = directory, keep_last, keep_every
        # The thread's collectives must not interleave with training's, so they have their own group, over host memory.
        self.world = replace(world, group=dist.new_group(backend="gloo")) if world.size > 1 else world
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def save(self, snapshot: Snapshot) -> Path:
        """Wait for the previous save, then begin to write `snapshot`; returns the folder that it will be in."""
        self.wait()
        copy = snapshot.on_host(self.world)
        self._thread = threading.Thread(target=self._write, args=(copy,), name="checkpoint")
        self._thread.start()
        return self.directory / f"step-{snapshot.state['step']}"

    def wait(self) -> None:
        """Wait until the save in flight has ended; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            save(self.directory, snapshot, self.world, keep_last=self.keep_last, keep_every=self.keep_every)
        except Exception as error:  # `wait` raises it again, whatever it is
            self._error = error


def save(directory: Path, snapshot: Snapshot, world: World, *, keep_last: int, keep_every: int = 0) -> Path:
    """Write `directory/step-N`, N = snapshot.state["step"]; every rank calls it.

    Of the checkpoints up to N, the newest `keep_last` (0: all) and those whose step is a multiple of `keep_every`
    (0: none) are kept. A complete `step-N` that already exists is not replaced. Raises CheckpointError on every rank if
    any rank could not write, or has a weight or a moment that is not finite; earlier checkpoints are not changed.
    """
    final = directory / f"step-{snapshot.state['step']}"
    aside = directory / f".{final.name}.partial"
    error = None
    if world.is_main:
        error = _attempt(lambda: _fresh(aside))
    error = world.broadcast(error)
    entries: dict[str, dict[str, Any]] = {}
    if error is None:
        error = _not_finite(snapshot) or _attempt(lambda: entries.update(_write_rank(aside, snapshot, world)))
    gathered = world.gather((error, entries))
    errors = [message for message, _ in gathered if message]
    if not errors and world.is_main:
        files = {name: entry for _, part in gathered for name, entry in part.items()}
        error = _attempt(lambda: _publish(aside, final, files, world.size, keep_last, keep_every))
        errors = [error] if error else []
    errors = world.broadcast(errors)
    if errors:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{final} was not saved: {errors[0]}. Earlier checkpoints are untouched")
    return final


def newest(
    directory: Path, world: World, *, fits: Callable[[dict[str, Any]], bool] = lambda state: True
) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint in `directory`; returns it and a line about each damaged one passed over.

    fits: skips checkpoints for whose state.json it returns False.
    """
    found, skipped = None, []
    if world.is_main:
        for _, path in reversed(_numbered(directory)):
            problem = _problem(path)
            if problem is not None:
                skipped.append(f"{path.name} is passed over: {problem}")
            elif fits(load_state(path)):
                found = path
                break
    return world.broadcast((found, skipped))


def require_complete(path: Path, world: World) -> None:
    """Raise CheckpointError, on every rank, if the checkpoint `path` is incomplete or damaged."""
    problem = world.broadcast(_problem(path) if world.is_main else None)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: {problem}; name another checkpoint")


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises JsonFileError and OSError."""
    return read_object(path / "state.json").values


def load_model(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's weights by parameter name, or its adapters by PEFT's names.

    Raises CheckpointError if the file is not safetensors.
    """
    adapter = path / WEIGHTS_FILE
    file = adapter if adapter.exists() else path / "model.safetensors"
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def load_partitions(path: Path, sizes: dict[str, tuple[int, int]], world: World) -> dict[str, Tensor]:
    """Read this rank's part of each flat optimizer tensor, whatever number of ranks wrote them.

    sizes: name -> (elements of this rank's partition now, elements of the whole tensor without the padded tail).
    Raises CheckpointError if a file is not safetensors, or a tensor on disk is shorter than the model needs.
    """
    writers = _read_manifest(path).whole("world_size", least=1)
    shards = [_open(path / f"rank-{rank}-of-{writers}.safetensors") for rank in range(writers)]
    parts = {}
    for name, (length, whole) in sizes.items():
        pieces = [shard.get_slice(name) for shard in shards]
        stride = pieces[0].get_shape()[0]
        if stride * writers < whole:
            raise CheckpointError(f"{path}: {name} has {stride * writers:,} elements, this model needs {whole:,}")
        begin, end = world.rank * length, min((world.rank + 1) * length, whole)
        part = torch.zeros(length)
        for rank, piece in enumerate(pieces):
            low, high = max(begin, rank * stride), min(end, (rank + 1) * stride)
            if low < high:
                part[low - begin : high - begin] = piece[low - rank * stride : high - rank * stride]
        parts[name] = part
    return parts


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def restore_random_states(path: Path, world: World) -> None:
    """Set this rank's random states, if the same number of ranks wrote the checkpoint."""
    file = path / f"rank-{world.rank}-of-{world.size}.json"
    if not file.exists():
        return
    states = read_object(file).values
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def random_states() -> dict[str, Any]:
    """Random states of Python, NumPy and torch, JSON-able."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def _write_rank(folder: Path, snapshot: Snapshot, world: World) -> dict[str, dict[str, Any]]:
    """Write this rank's files; returns file name -> {bytes, sha256}."""
    stem = f"rank-{world.rank}-of-{world.size}"
    save_file({name: tensor.cpu() for name, tensor in snapshot.partitions.items()}, folder / f"{stem}.safetensors")
    (folder / f"{stem}.json").write_text(json.dumps(snapshot.random_states), encoding="utf-8")
    names = [f"{stem}.safetensors", f"{stem}.json"]
    if world.is_main:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.model.items()}
        model = "model.safetensors" if snapshot.adapter is None else WEIGHTS_FILE
        save_file(weights, folder / model, metadata={"format": "pt"})
        if snapshot.adapter is not None:
            (folder / CONFIG_FILE).write_text(json.dumps(snapshot.adapter, indent=1), encoding="utf-8")
            names.append(CONFIG_FILE)
        (folder / "state.json").write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
        names += [model, "state.json"]
    for name in names:
        sync_file(folder / name)
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def _publish(aside: Path, final: Path, files: dict[str, Any], world_size: int, keep_last: int, keep_every: int) -> None:
    """Write the manifest, rename the folder, point `latest` at it, and remove checkpoints that are too old."""
    manifest = {"format": FORMAT, "world_size": world_size, "files": files}
    manifest["sha256"] = _own_sha256(manifest)
    _write_synced(aside / "manifest.json", json.dumps(manifest, indent=1))
    sync_directory(aside)
    if final.exists() and _problem(final) is None:
        shutil.rmtree(aside)  # this start was stopped before it took a step: do not put the old checkpoint at risk
    else:
        if final.exists():
            shutil.rmtree(final)  # damaged: the resume passed over it and trained its step again
        aside.rename(final)
    pointer = final.parent / "latest"
    _write_synced(pointer.with_suffix(".tmp"), final.name)
    pointer.with_suffix(".tmp").replace(pointer)
    sync_directory(final.parent)
    # Newer checkpoints are damaged (a resume passed over them): they do not count among the newest kept.
    step = int(final.name.removeprefix("step-"))
    older = [(number, path) for number, path in _numbered(final.parent) if number <= step]
    for number, old in older[:-keep_last] if keep_last else []:
        if not keep_every or number % keep_every:
            hidden = old.with_name(f".{old.name}.removed")  # a half-removed folder must not look like a checkpoint
            old.rename(hidden)
            shutil.rmtree(hidden)


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    """List (N, path) of every `step-N` in `directory`, in order of N."""
    return sorted((int(match[1]), path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name)))


def _problem(path: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None. Reads and hashes every file."""
    try:
        manifest = _read_manifest(path)
        files = manifest.inner("files")
        for name in files.values:
            entry = files.inner(name)
            status = (path / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != entry.whole("bytes"):
                return f"{name} has {status.st_size:,} bytes, the manifest says {entry.whole('bytes'):,}"
            if sha256_of(path / name) != entry.text("sha256"):
                return f"{name} does not have the manifest's SHA-256"
        step = read_object(path / "state.json").whole("step")
        if path.name != f"step-{step}":
            return f"state.json belongs to step {step}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except JsonFileError as error:
        return str(error).replace(f"{path}{os.sep}", "")
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def _read_manifest(path: Path) -> Fields:
    """Read a checkpoint's manifest.json.

    Raises OSError, and JsonFileError for another format, a wrong hash of its own content, or missing or extra files.
    """
    manifest = read_object(path / "manifest.json")
    if manifest.whole("format") != FORMAT:
        manifest.refuse("format", f"{FORMAT}, which this version writes and reads")
    content = {name: value for name, value in manifest.values.items() if name != "sha256"}
    if manifest.text("sha256") != _own_sha256(content):
        manifest.refuse("sha256", f"{_own_sha256(content)}, the hash of its content: the file is damaged")
    world_size = manifest.whole("world_size", least=1, most=2**20)
    ranks = {f"rank-{rank}-of-{world_size}{end}" for rank in range(world_size) for end in (".safetensors", ".json")}
    files = set(manifest.inner("files").values)
    if all(files != {*model, "state.json", *ranks} for model in (MODEL_FILES, ADAPTER_FILES)):
        manifest.refuse("files", f"model.safetensors, state.json, and two files for each of {world_size} ranks")
    return manifest


def _own_sha256(content: dict[str, Any]) -> str:
    """Hash a manifest's content without its own hash, as a hex digest that does not depend on white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _not_finite(snapshot: Snapshot) -> str | None:
    """Name a tensor that is not finite, or return None; nothing is checked in a snapshot already `checked`."""
    if snapshot.checked:
        return None
    tensors = {**{f"the weights of {name}": x for name, x in snapshot.model.items()}, **snapshot.partitions}
    broken = next((name for name, x in tensors.items() if not bool(torch.isfinite(x).all())), None)
    return None if broken is None else f"{broken} is not finite; go on with --resume and a lower --learning-rate"


def _attempt(action: Any) -> str | None:
    """Run an action; returns its error as text, which can be sent to every rank, or None if it succeeded."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _fresh(folder: Path) -> None:
    """Make `folder`, after removing what a killed save left beside it."""
    for leftover in folder.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync_file(path)

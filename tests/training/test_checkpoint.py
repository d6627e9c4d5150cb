"""Checkpoints are complete or absent, load on any number of ranks, and are never used when damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi_fast.training import checkpoint
from phi_fast.training.checkpoint import CheckpointError, Saver, Snapshot
from phi_fast.training.distributed import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        state={"step": step, "zero": {"updates": step}},
        model={"weight": torch.randn(3, 5, generator=generator)},
        partitions={
            "master.0": torch.randn(10, generator=generator),
            "exp_avg.0": torch.randn(10, generator=generator),
        },
    )


def save(directory: Path, *steps: int, keep_last: int = 0) -> None:
    for step in steps:
        checkpoint.save(directory, snapshot(step), ALONE, keep_last=keep_last)


def saver(directory: Path, **kept: int) -> Saver:
    return Saver(directory, ALONE, **{"keep_last": 0, **kept})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 7)
    path, skipped = checkpoint.newest(tmp_path, ALONE)
    assert path == tmp_path / "step-7"
    assert skipped == []
    expected = snapshot(7)
    assert checkpoint.load_state(path) == expected.state
    assert torch.equal(checkpoint.load_model(path)["weight"], expected.model["weight"])
    parts = checkpoint.load_partitions(path, {"master.0": (10, 10), "exp_avg.0": (10, 10)}, ALONE)
    assert all(torch.equal(parts[name], tensor) for name, tensor in expected.partitions.items())
    assert (tmp_path / "latest").read_text() == "step-7"


def test_keep_last_removes_the_oldest_by_number(tmp_path: Path) -> None:
    save(tmp_path, 8, 9, 10, 100, keep_last=2)
    assert names(tmp_path) == ["latest", "step-10", "step-100"]


def test_keep_every_keeps_its_multiples_for_good(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        checkpoint.save(tmp_path, snapshot(step), ALONE, keep_last=1, keep_every=4)
    assert names(tmp_path) == ["latest", "step-12", "step-4", "step-8"]


def test_a_damaged_newer_one_does_not_count_among_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 2, 8)
    flip(tmp_path / "step-8" / "state.json")
    save(tmp_path, 4, keep_last=1)
    assert checkpoint.newest(tmp_path, ALONE)[0] == tmp_path / "step-4"
    save(tmp_path, 8, keep_last=1)
    assert checkpoint.newest(tmp_path, ALONE) == (tmp_path / "step-8", [])
    assert names(tmp_path) == ["latest", "step-8"]


def test_a_complete_one_of_the_same_step_stays(tmp_path: Path) -> None:
    save(tmp_path, 2)
    before = (tmp_path / "step-2" / "manifest.json").stat().st_ino
    save(tmp_path, 2)
    assert (tmp_path / "step-2" / "manifest.json").stat().st_ino == before
    assert names(tmp_path) == ["latest", "step-2"]


def test_a_save_in_the_background_is_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint holds the values at the call of `save`, although it is written while training goes on."""
    go = threading.Event()
    write = checkpoint._write_rank

    def late(*given: Any) -> Any:
        go.wait(10)
        return write(*given)

    monkeypatch.setattr(checkpoint, "_write_rank", late)
    background, live = saver(tmp_path), snapshot(3)
    expected = random.getstate()
    assert background.save(live) == tmp_path / "step-3"
    assert not (tmp_path / "step-3").exists()
    for tensor in (*live.model.values(), *live.partitions.values()):
        tensor.zero_()
    random.random()
    go.set()
    background.wait()
    assert torch.equal(checkpoint.load_model(tmp_path / "step-3")["weight"], snapshot(3).model["weight"])
    parts = checkpoint.load_partitions(tmp_path / "step-3", {"master.0": (10, 10)}, ALONE)
    assert torch.equal(parts["master.0"], snapshot(3).partitions["master.0"])
    checkpoint.restore_random_states(tmp_path / "step-3", ALONE)
    assert random.getstate() == expected


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    write = checkpoint._write_rank

    def count(*given: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return write(*given)

    monkeypatch.setattr(checkpoint, "_write_rank", count)
    background = saver(tmp_path)
    for step in range(4):
        background.save(snapshot(step))
    background.wait()
    assert most == 1
    assert names(tmp_path) == ["latest", "step-0", "step-1", "step-2", "step-3"]


@pytest.mark.parametrize("at", ["save", "wait"])
def test_a_failure_in_the_background_is_raised_once_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    background = saver(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "sync_file", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        background.save(snapshot(1))
        background._thread.join()
    assert background.failed
    with pytest.raises(CheckpointError, match=r"step-1 was not saved: OSError: .*Input/output error"):
        background.wait() if at == "wait" else background.save(snapshot(2))
    assert not background.failed
    background.save(snapshot(3))
    background.wait()
    assert names(tmp_path) == ["latest", "step-3"]


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file, where a folder is wanted")
    with pytest.raises(CheckpointError, match=r"step-1 was not saved: (NotADirectory|FileExists)Error"):
        save(tmp_path / "checkpoints", 1)


def test_random_states_are_restored(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    expected = draw()
    draw()
    checkpoint.restore_random_states(tmp_path / "step-1", ALONE)
    assert draw() == expected


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model.safetensors", truncate, "model.safetensors has"),
        ("model.safetensors", flip, "model.safetensors does not have the manifest's SHA-256"),
        ("rank-0-of-1.safetensors", Path.unlink, "rank-0-of-1.safetensors is missing"),
        ("rank-0-of-1.json", flip, "rank-0-of-1.json does not have"),
        ("state.json", flip, "state.json does not have"),
        ("manifest.json", truncate, "manifest.json is not JSON"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-2" / file)
    path, skipped = checkpoint.newest(tmp_path, ALONE)
    assert path == tmp_path / "step-1"
    assert len(skipped) == 1
    assert skipped[0].startswith(f"step-2 is passed over: {reason}")


def test_swapped_checkpoints_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    swap(tmp_path / "step-1" / "model.safetensors", tmp_path / "step-2" / "model.safetensors")
    (tmp_path / "step-3").rename(tmp_path / "step-9")
    assert checkpoint.newest(tmp_path, ALONE) == (
        None,
        [
            "step-9 is passed over: state.json belongs to step 3",
            "step-2 is passed over: model.safetensors does not have the manifest's SHA-256",
            "step-1 is passed over: model.safetensors does not have the manifest's SHA-256",
        ],
    )


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "rank-0-of-1.safetensors"])
def test_a_pickle_is_not_loaded(tmp_path: Path, name: str) -> None:
    """A pickle is refused even if the manifest has its size and hash."""
    save(tmp_path, 1)
    file = tmp_path / "step-1" / name
    torch.save({"weight": torch.zeros(3, 5)}, file)
    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    manifest["files"][name] = entry
    write_manifest(tmp_path / "step-1", manifest)
    path, _ = checkpoint.newest(tmp_path, ALONE)
    assert path is not None
    with pytest.raises(CheckpointError, match=rf"{name} is not a safetensors file"):
        checkpoint.load_model(path)
        checkpoint.load_partitions(path, {"master.0": (10, 10)}, ALONE)


def test_a_manifest_of_another_format_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    assert checkpoint.newest(tmp_path, ALONE)[1] == [
        "step-1 is passed over: manifest.json: format is 99, expected 2, which this version writes and reads"
    ]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the hash of its own content, as a program that knows the format could."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))


def flip_is_harmless(directory: Path, whole: bytes, bit: int) -> bool:
    """Flip a bit in the newer checkpoint's manifest; returns whether that checkpoint is still used.

    Asserts that it is used only if the manifest's content is unchanged, and that the older one is used otherwise.
    """
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    (directory / "step-2" / "manifest.json").write_bytes(damaged)
    path, skipped = checkpoint.newest(directory, ALONE)
    if path == directory / "step-2":
        assert json.loads(damaged) == json.loads(whole), "used, although its content changed"
        return True
    assert path == directory / "step-1", f"{path} is used"
    assert skipped[0].startswith("step-2 is passed over: manifest.json")
    return False


def test_every_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Only flips in white space are accepted, because they leave the content unchanged."""
    save(tmp_path, 1, 2)
    whole = (tmp_path / "step-2" / "manifest.json").read_bytes()
    accepted = sum(flip_is_harmless(tmp_path, whole, bit) for bit in range(8 * len(whole)))
    assert accepted < 8 * len(whole) / 20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"world_size": 2}, "files is {.*expected model.safetensors, state.json, and two files for each of 2 ranks"),
        ({"world_size": True}, "world_size is True, expected an integer"),
        ({"world_size": 0}, "world_size is 0, expected an integer from 1"),
        ({"world_size": 10**12}, "world_size is 1000000000000, expected an integer from 1"),
        ({"world_size": None}, "world_size is None, expected an integer"),
        ({"files": []}, r"files is \[\], expected an object"),
        ({"files": {"../model.safetensors": {"bytes": 1, "sha256": ""}}}, "files is {.*expected model.safetensors"),
        ({"format": "2"}, "format is '2', expected an integer"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_passed_over(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "step-2"
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()) | change)
    path, skipped = checkpoint.newest(tmp_path, ALONE)
    assert path == tmp_path / "step-1"
    assert re.match(f"step-2 is passed over: manifest.json: {reason}", skipped[0]), skipped


@pytest.mark.parametrize("entry", [{"bytes": "12", "sha256": "0"}, {"bytes": 12}, {"bytes": -1, "sha256": "0"}, 7])
def test_a_manifest_with_a_wrong_entry_is_passed_over(tmp_path: Path, entry: Any) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "step-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = entry
    write_manifest(folder, manifest)
    path, skipped = checkpoint.newest(tmp_path, ALONE)
    assert path == tmp_path / "step-1"
    assert "state.json" in skipped[0]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "rank-0-of-1.json"])
def test_a_fifo_in_a_files_place_is_passed_over(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, 2)
    file = tmp_path / "step-2" / name
    file.unlink()
    os.mkfifo(file)
    path, skipped = checkpoint.newest(tmp_path, ALONE)
    assert path == tmp_path / "step-1"
    assert name in skipped[0] and ("FIFO" in skipped[0] or "not a regular file" in skipped[0])


@pytest.mark.parametrize("tensor", ["model", "partitions"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_saved_and_costs_no_earlier_checkpoint(
    tmp_path: Path, tensor: str, value: float
) -> None:
    save(tmp_path, 1)
    broken = snapshot(2)
    name = next(iter(getattr(broken, tensor)))
    getattr(broken, tensor)[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"{name} is not finite"):
        checkpoint.save(tmp_path, broken, ALONE, keep_last=1)
    assert names(tmp_path) == ["latest", "step-1"]


def test_a_save_that_was_killed_leaves_nothing_that_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1").rename(tmp_path / ".step-2.partial")
    assert checkpoint.newest(tmp_path, ALONE) == (None, [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-2"]


@pytest.mark.parametrize("during", ["_write_rank", "_publish"])
def test_a_failed_save_costs_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, during, full)
    with pytest.raises(CheckpointError, match=r"step-2 was not saved: OSError.*No space left on device.*untouched"):
        save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["latest", "step-1"]
    assert checkpoint.newest(tmp_path, ALONE) == (tmp_path / "step-1", [])


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_partitions_are_cut_anew_for_another_number_of_ranks(tmp_path: Path, writers: int, readers: int) -> None:
    whole = torch.arange(1.0, 22.0)  # 21 elements, so that every number of ranks has a padded tail
    save(tmp_path, 1)
    path = tmp_path / "step-1"

    def partitions(ranks: int) -> list[torch.Tensor]:
        length = -(-whole.numel() // ranks)
        return list(torch.nn.functional.pad(whole, (0, length * ranks - whole.numel())).split(length))

    files = {}
    for rank, part in enumerate(partitions(writers)):
        world = World(rank, writers, rank, torch.device("cpu"))
        files |= checkpoint._write_rank(path, Snapshot({}, {}, {"master.0": part}), world)
    write_manifest(path, {"format": checkpoint.FORMAT, "world_size": writers, "files": files})
    for rank, expected in enumerate(partitions(readers)):
        world = World(rank, readers, rank, torch.device("cpu"))
        sizes = {"master.0": (expected.numel(), whole.numel())}
        assert torch.equal(checkpoint.load_partitions(path, sizes, world)["master.0"], expected)


def test_partitions_of_a_smaller_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"master\.0 has 10 elements, this model needs 12"):
        checkpoint.load_partitions(tmp_path / "step-1", {"master.0": (12, 12)}, ALONE)


def test_a_file_system_without_a_sync_of_directories_takes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFS and some shared folders return EINVAL."""
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", refusing)
    save(tmp_path, 1, 2, keep_last=1)
    assert checkpoint.newest(tmp_path, ALONE) == (tmp_path / "step-2", [])

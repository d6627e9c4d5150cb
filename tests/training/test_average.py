"""The moving average of the weights: its values, what it leaves alone, and its way into checkpoints and models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_processes import arguments, finish, latest, losses, optimizer_state, weights

from phi_fast.conversion.errors import ConversionError
from phi_fast.conversion.load import load
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model.merged import to_merged
from phi_fast.train import INTERRUPTED
from phi_fast.training.average import WeightAverage

DECAY = 0.75


def measured(run: Path, field: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[field] for line in lines if line.get(field) is not None]


def flat(run: Path, step: int, kind: str, ranks: int) -> Tensor:
    """A kind of tensor of a checkpoint, all groups and ranks joined."""
    folder = run / "checkpoints" / f"step-{step}"
    shards = [load_file(folder / f"rank-{rank}-of-{ranks}.safetensors") for rank in range(ranks)]
    groups = sorted(name for name in shards[0] if name.startswith(f"{kind}."))
    assert groups
    return torch.cat([shard[name] for name in groups for shard in shards]).double()


def test_the_average_is_the_recursion_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    masters = [torch.randn(n, generator=draw) for n in (7, 100)]
    average = WeightAverage(0.9, masters)
    expected = [master.double() for master in masters]
    for step in range(50):
        skipped = step % 5 == 3
        for i, master in enumerate(masters):
            if not skipped:
                master += 0.1 * torch.randn(master.shape, generator=draw)
                expected[i] = 0.9 * expected[i] + (1 - 0.9) * master.double()
        before = [one.clone() for one in average.averages]
        average.update(torch.tensor(1.0 if skipped else 0.0))
        if skipped:
            assert all(torch.equal(*pair) for pair in zip(before, average.averages, strict=True))
    for one, right in zip(average.averages, expected, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-6)
    average.load(None)
    assert all(torch.equal(*pair) for pair in zip(average.averages, masters, strict=True))


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_checkpoints_have_the_average_of_the_master_weights(
    data: Path, tmp_path: Path, ranks: int, precision: str
) -> None:
    """Computed again, from the master weights of every step."""
    run = tmp_path / "run"
    words = arguments(data, run, 6, ema_decay=DECAY, save_every=1, keep_last=0, precision=precision, learning_rate=0.01)
    finish(words, tmp_path, ranks=ranks)
    average = flat(run, 1, "ema", ranks)
    for step in range(2, 7):
        master = flat(run, step, "master", ranks)
        average = DECAY * average + (1 - DECAY) * master
        torch.testing.assert_close(flat(run, step, "ema", ranks), average, rtol=1e-5, atol=1e-7)
    assert (flat(run, 6, "ema", ranks) - master).abs().max() > 1e-3
    # One step from the start: the average has moved from the first weights by a quarter of the step.
    first = flat(run, 1, "master", ranks) - 4 * (flat(run, 1, "master", ranks) - flat(run, 1, "ema", ranks)) / 3
    assert (first - flat(run, 1, "master", ranks)).abs().max() <= 0.0101


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_training_is_the_same_with_it_and_without(data: Path, tmp_path: Path, ranks: int, precision: str) -> None:
    """Also between validations, which give the model the averaged weights for a time."""
    for name, more in (("with", {"ema_decay": DECAY}), ("without", {})):
        words = arguments(data, tmp_path / name, 5, val_every=2, precision=precision, **more)
        finish(words, tmp_path, ranks=ranks)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for field in ("val_loss", "val_bpb"):
        assert measured(tmp_path / "with", field) == measured(tmp_path / "without", field)
    assert measured(tmp_path / "with", "ema_val_loss")[0] == measured(tmp_path / "with", "val_loss")[0]
    assert len(measured(tmp_path / "with", "ema_val_bpb")) == 4
    assert measured(tmp_path / "without", "ema_val_loss") == []
    assert all(torch.equal(weights(tmp_path / "with")[name], x) for name, x in weights(tmp_path / "without").items())


def test_a_resumed_average_is_the_undisturbed_one_bit_for_bit(data: Path, tmp_path: Path) -> None:
    more = {
        "ema_decay": DECAY,
        "z_loss": 1e-3,
        "skip_norm_spikes": 90,
        "schedule": "wsd",
        "decay_steps": 3,
        "val_every": 2,
    }
    words = {name: arguments(data, tmp_path / name, 6, **more) for name in ("whole", "parts", "ranks")}
    finish(words["whole"], tmp_path)
    finish([*words["parts"], "--stop-after", "3"], tmp_path, expect=INTERRUPTED)
    finish([*words["parts"], "--resume"], tmp_path)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert measured(tmp_path / "parts", "ema_val_loss") == measured(tmp_path / "whole", "ema_val_loss")
    for state in (weights, optimizer_state):
        expected, found = state(tmp_path / "whole"), state(tmp_path / "parts")
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    finish([*words["ranks"], "--stop-after", "3"], tmp_path, expect=INTERRUPTED)
    finish([*words["ranks"], "--resume"], tmp_path, ranks=2)
    whole, parts = flat(tmp_path / "whole", 6, "ema", 1), flat(tmp_path / "ranks", 6, "ema", 2)
    assert parts.numel() - whole.numel() < 8  # the padding of two ranks' parts
    assert measured(tmp_path / "ranks", "ema_val_loss") == pytest.approx(
        measured(tmp_path / "whole", "ema_val_loss"), abs=1e-4
    )


def test_an_average_may_begin_and_end_on_the_way(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 6, save_every=1, keep_last=0)
    finish([*words, "--stop-after", "2"], tmp_path, expect=INTERRUPTED)
    resume = [*words, "--resume", "--ema-decay", str(DECAY), "--stop-after", "2"]
    output = finish(resume, tmp_path, expect=2)
    assert "ema_decay was None, is now 0.75" in output
    finish([*resume, "--allow-change"], tmp_path, expect=INTERRUPTED)
    run = tmp_path / "run"
    expected = flat(run, 2, "master", 1)
    for step in (3, 4):
        expected = DECAY * expected + (1 - DECAY) * flat(run, step, "master", 1)
    torch.testing.assert_close(flat(run, 4, "ema", 1), expected, rtol=1e-5, atol=1e-7)
    finish([*words, "--resume", "--ema-decay", "None", "--allow-change"], tmp_path)
    assert not any(name.startswith("ema") for name in optimizer_state(run))


def test_a_skipped_step_leaves_the_average_alone(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(data, run, 21, ema_decay=DECAY, skip_norm_spikes=9, learning_rate=1e-4, save_every=1, keep_last=3)
    finish(words, tmp_path, fault="multiply_gradients_at_steps", given=[20])
    assert torch.equal(flat(run, 19, "ema", 1), flat(run, 20, "ema", 1))
    assert not torch.equal(flat(run, 20, "ema", 1), flat(run, 21, "ema", 1))


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    words = arguments(data, folder / "run", 4, ema_decay=DECAY, val_every=4, precision="bf16", learning_rate=0.01)
    finish(words, folder, ranks=2)
    return folder / "run"


def test_the_converted_average_has_the_loss_that_validation_measured(
    data: Path, averaged: Path, tmp_path: Path
) -> None:
    """Loaded by another run in the same dtype; and it is the checkpoint's own tensors, in the order of the model."""
    out = convert(ConvertOptions(str(averaged), tmp_path / "model", ema=True))
    words = arguments(data, tmp_path / "zero", 0, init_from=out, val_every=1, precision="bf16")
    words = [word for pair in zip(words[::2], words[1::2], strict=True) if "model." not in pair[0] for word in pair]
    finish(words, tmp_path)
    assert measured(tmp_path / "zero", "val_loss")[-1] == pytest.approx(
        measured(averaged, "ema_val_loss")[-1], abs=2e-6
    )
    assert abs(measured(averaged, "ema_val_loss")[-1] - measured(averaged, "val_loss")[-1]) > 1e-3
    written = to_merged(load_file(out / "model.safetensors"))
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    matrices = ("embed_tokens.weight", "layers.0.in_proj.weight", "layers.0.out_proj.weight", "lm_head.weight")
    expected = torch.cat([written[name].flatten() for name in matrices])
    parts = [load_file(latest(averaged) / f"rank-{rank}-of-2.safetensors")["ema.0"] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts)[: len(expected)], expected)
    model, _ = load(averaged, dtype="fp32", device="cpu", ema=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in written.items())


def test_a_run_without_an_average_is_refused(data: Path, tmp_path: Path) -> None:
    finish(arguments(data, tmp_path / "run", 1), tmp_path)
    for source in (tmp_path / "run", convert(ConvertOptions(str(tmp_path / "run"), tmp_path / "model"))):
        with pytest.raises(ConversionError, match="has no average of the weights: name a run that was trained with"):
            convert(ConvertOptions(str(source), tmp_path / "other", ema=True))
        with pytest.raises(ConversionError, match="or leave --ema out"):
            load(source, ema=True)

"""metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from step_records import at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from phi_fast.errors import UsageError
from phi_fast.recipes import RECIPES
from phi_fast.training.distributed import World
from phi_fast.training.metrics import Meter, MetricsLog
from phi_fast.training.zero import StepOutcome


def steps_in(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(at(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # killed while it wrote
    log = MetricsLog(tmp_path, 3)
    log.write(at(4, loss=1.0))
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(at(1, loss=float("nan"), grad_norm=None, skipped=True))
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["skipped"] is True


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(UsageError, match=r"metrics\.jsonl cannot be written \(No space left on device\): make room"):
        log.write(at(1))


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(at(1, val_loss=8.5, val_losses={"docs": 8.4, "code": 8.9}))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    groups = {
        "loss": ("train", "validation", "validation/docs", "validation/code"),
        "speed": ("tokens_per_s", "step_ms"),
    }
    groups["optimizer"] = ("lr", "grad_norm", "loss_scale", "skipped")
    assert set(events.Tags()["scalars"]) == {f"{group}/{name}" for group, names in groups.items() for name in names}
    assert events.Scalars("loss/train")[0].value == pytest.approx(9.01)
    assert events.Scalars("loss/validation")[0].value == pytest.approx(8.5)
    assert events.Scalars("loss/validation/code")[0].value == pytest.approx(8.9)


def test_tensorboard_has_the_hyperparameters(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, {"learning_rate": 2e-4, "model.hidden_size": 64, "tokenizer": "phi-1.5"}).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["learning_rate"].number_value == 2e-4
    assert given["model.hidden_size"].number_value == 64
    assert given["tokenizer"].string_value == "phi-1.5"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # no second run beside it


def test_the_validation_before_the_first_step_is_recorded(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.validation_before(9.1, {"docs": 9.0, "code": 9.5})
    log.write(at(1))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "tokens": 0, "val_loss": 9.1, "val_losses": {"docs": 9.0, "code": 9.5}}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/validation")] == [(0, pytest.approx(9.1))]
    MetricsLog(tmp_path, 1).close()
    assert steps_in(tmp_path) == [0, 1]  # a resumed run keeps it
    MetricsLog(tmp_path, 0).close()
    assert steps_in(tmp_path) == []  # a run that starts over measures it again


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"loss": 3.0}', r"metrics\.jsonl:2: step is missing, expected an integer of at least 0\. Correct or remove"),
        ('{"step": "1"}', r"metrics\.jsonl:2: step is '1', expected an integer"),
        ("[1]", r"metrics\.jsonl:2 holds a JSON list, expected an object"),
        ("{", r"metrics\.jsonl:2 is not JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named_on_resume(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        MetricsLog(tmp_path, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307.4e12),
        ("Other", None),
    ],
)
def test_mfu_needs_a_known_peak(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at 10 % of the peak, computed from the model's own count of FLOPs."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    recipe = RECIPES["phi-1.5"]
    flops = recipe.model.flops_per_token(recipe.sequence_length, causal=False) * recipe.tokens_per_step
    outcome = StepOutcome(2.0, 1.0, 1.0, skipped=False, spike=False, hopeless=False, broken=False)
    for device, expected in ((torch.device("cuda", 0), peak), (torch.device("cpu"), None)):
        record = Meter(recipe, World(0, 1, 0, device)).record(3, outcome, 1e-3, 10 * flops / (peak or 1.0))
        assert record.mfu == (None if expected is None else pytest.approx(0.1))
        assert record.tokens == 3 * recipe.tokens_per_step

"""Plans with the efficiencies that `make gpu` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi_fast.plan import main
from phi_fast.planning.devices import DEVICES
from phi_fast.planning.measured import measured_device


def day(path: Path, efficiencies: Any, device: str = "NVIDIA H100 80GB HBM3") -> Path:
    results = {} if efficiencies is None else {"efficiencies": efficiencies}
    path.write_text(json.dumps({"machine": {"device": device}, "stages": {"step": {"results": results}}}))
    return path


def test_what_was_measured_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    file = day(tmp_path / "day.json", {"product": 0.71, "memory": 0.9})
    device = measured_device(DEVICES["H100"], file)
    assert {kind: figure.value for kind, figure in device.efficiency.items()} == {
        "product": 0.71,
        "memory": 0.9,
        "attention forward": DEVICES["H100"].efficiency["attention forward"].value,
        "attention backward": DEVICES["H100"].efficiency["attention backward"].value,
    }
    assert device.efficiency["product"].source == "measured on NVIDIA H100 80GB HBM3: day.json"


def test_the_command_plans_with_it_and_names_its_source(tmp_path: Path) -> None:
    file = day(tmp_path / "day.json", dict.fromkeys(("product", "attention forward", "attention backward"), 0.5))
    seconds = []
    for words in ([], ["--measured", str(file)]):
        assert main(["--gpu", "H100", "--gpus", "8", "--json", str(tmp_path / "plan.json"), *words]) == 0
        text = (tmp_path / "plan.json").read_text()
        assert ("measured on NVIDIA H100" in text) is bool(words)
        seconds.append(text)
    assert seconds[0] != seconds[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"machine": {"device": "NVIDIA H100"}}', "stages is missing, expected an object"),
        ('{"machine": {"device": "NVIDIA A100"}, "stages": {}}', "was measured on NVIDIA A100, and --gpu is H100"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "day.json"
    if content is not None:
        file.write_text(content)
    assert main(["--gpu", "H100", "--measured", str(file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("efficiencies", "message"),
    [(None, "did not reach the profile of a step"), ({"product": -1}, "product is -1, expected a share")],
)
def test_what_was_not_measured_is_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], efficiencies: Any, message: str
) -> None:
    assert main(["--gpu", "H100", "--measured", str(day(tmp_path / "day.json", efficiencies))]) == 2
    assert message in capsys.readouterr().err


def test_a_cpu_measures_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--measured", str(day(tmp_path / "day.json", {}))]) == 2
    assert "a CPU's own rates are measured" in capsys.readouterr().err

"""Trackers, each against its real package without network: what arrives, resumes, and failures that end nothing."""

from __future__ import annotations

import json
import sqlite3
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from step_records import at
from trainer_processes import arguments, finish, losses

from phi_fast.errors import UsageError
from phi_fast.train import INTERRUPTED
from phi_fast.training.metrics import MetricsLog
from phi_fast.training.options import parse
from phi_fast.training.trackers import background
from phi_fast.training.trackers.background import Background
from phi_fast.training.trackers.opening import NAMES, check_trackers, open_trackers

Points = list[tuple[int, float]]


class Shown:
    """What a tracker's own storage has of one run."""

    def __init__(self, loss: Points, config: Mapping[str, object], texts: str, pages: str) -> None:
        self.loss, self.config, self.texts, self.pages = loss, config, texts, pages


def shown_by_trackio(folder: Path) -> Shown:
    database = sqlite3.connect(folder / "trackio" / "phi_fast.db")
    [(config,)] = database.execute("SELECT config FROM configs").fetchall()
    rows = [(step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics")]
    assert len({name for (name,) in database.execute("SELECT run_name FROM metrics")}) == 1
    loss = [(step, row["loss/train"]) for step, row in rows if "loss/train" in row]
    texts = "".join(row["sample"]["_value"] for _, row in rows if "sample" in row)
    pages = [path.read_bytes() for path in (folder / "trackio" / "artifacts").rglob("*") if path.is_file()]
    return Shown(loss, json.loads(config), texts, next(p.decode() for p in pages if b"<html" in p))


def shown_by_mlflow(folder: Path) -> Shown:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("phi_fast")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    config = json.loads((artifacts / "config.json").read_text())
    assert run.data.params["learning_rate"] == str(config["learning_rate"])
    loss = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss/train")]
    texts = "".join(path.read_text() for path in (artifacts / "sample").iterdir())
    return Shown(loss, config, texts, (artifacts / "report.html").read_text())


def records_of_wandb(path: Path) -> list[bytes]:
    """Read wandb's file of an offline run: a header, then blocks as in LevelDB's log."""
    data, at_, parts, found = path.read_bytes(), 7, b"", []
    while at_ + 7 <= len(data):
        if 32768 - at_ % 32768 < 7:
            at_ += 32768 - at_ % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at_)
        parts += data[at_ + 7 : at_ + 7 + length]
        at_ += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(parts)
            parts = b""
    return found


def shown_by_wandb(folder: Path) -> Shown:
    from wandb.proto.wandb_internal_pb2 import Record

    starts = sorted((folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in starts}) == 1  # each start wrote under the id of the same run
    loss, config = [], {}
    for path in starts:
        for record in map(Record.FromString, records_of_wandb(path)):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "loss/train" in row:
                loss.append((row["step"], row["loss/train"]))
    html = [path.read_text() for path in (folder / "run" / "wandb").rglob("media/html/*.html")]
    texts = "".join(text for text in html if text.startswith("<pre>"))
    return Shown(loss, config, texts, next(text for text in html if "<html" in text))


SHOWN = {"wandb": shown_by_wandb, "trackio": shown_by_trackio, "mlflow": shown_by_mlflow}


def environment(folder: Path) -> dict[str, str]:
    return {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts"),
    }


@pytest.mark.parametrize(
    "name", ["trackio", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "mlflow"))]
)
def test_a_resumed_run_is_one_tracked_run_with_everything(name: str, data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4, track=name, sample_tokens=8, val_every=2)
    given = {"fault": "set_environment", "given": environment(tmp_path), "timeout": 300}
    output = finish([*words, "--stop-after", "2"], tmp_path, ranks=2, expect=INTERRUPTED, **given)
    output += finish([*words, "--resume"], tmp_path, **given)
    assert "has failed" not in output
    shown = SHOWN[name](tmp_path)
    assert [step for step, _ in shown.loss] == [1, 2, 3, 4]
    assert [loss for _, loss in shown.loss] == pytest.approx(losses(tmp_path / "run"))
    assert shown.config["model.hidden_size"] == 64
    assert shown.config["learning_rate"] == json.loads((tmp_path / "run" / "config.json").read_text())["learning_rate"]
    assert "The" in shown.texts
    assert "loss" in shown.pages


class Kept:
    """A tracker that keeps its calls, and fails or waits where a test says so."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails_at = 0
        self.closed = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.go_on.wait(30)
        if step == self.fails_at:
            raise ConnectionError("no network [/bold]")
        self.steps.append(step)

    def text(self, tag: str, text: str, step: int) -> None:
        raise AssertionError

    def page(self, path: Path) -> None:
        assert "<html" in path.read_text()

    def close(self) -> None:
        self.closed = True


def log_of(run: Path, tracker: Kept, warnings: list[str]) -> MetricsLog:
    (run / "config.json").write_text("{}")
    return MetricsLog(run, 0, None, [Background("kept", lambda: tracker, warnings.append)])


def test_a_tracker_that_fails_is_named_once_and_left_alone(tmp_path: Path) -> None:
    tracker, warnings = Kept(), []
    tracker.fails_at = 3
    log = log_of(tmp_path, tracker, warnings)
    for step in range(1, 6):
        log.write(at(step))
    log.text("sample", "text", 5)
    log.close()
    log.close()
    assert tracker.steps == [1, 2]
    assert warnings == [
        "--track kept has failed and is off now, the training goes on (ConnectionError: no network [/bold])"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(1)])
def test_a_tracker_that_cannot_be_opened_ends_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> Kept:
        raise error

    warnings: list[str] = []
    (tmp_path / "config.json").write_text("{}")
    log = MetricsLog(tmp_path, 0, None, [Background("kept", fail, warnings.append)])
    log.write(at(1))
    log.close()
    [warning] = warnings
    assert type(error).__name__ in warning


def test_a_slow_tracker_does_not_delay_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LAST_SECONDS", 0.1)
    monkeypatch.setattr(background, "MOST_WAITING", 20)
    for count, reason in ((10, "not everything was sent within 0 s"), (40, "20 records wait to be sent")):
        tracker, warnings = Kept(), []
        tracker.go_on.clear()
        log = log_of(tmp_path, tracker, warnings)
        started = time.monotonic()
        for step in range(1, count + 1):
            log.write(at(step))
        log.close()
        assert time.monotonic() - started < 20  # the tracker itself would wait for 30 s
        tracker.go_on.set()
        [warning] = warnings
        assert reason in warning


def test_what_waits_is_sent_before_the_end(tmp_path: Path) -> None:
    tracker, warnings = Kept(), []
    log = log_of(tmp_path, tracker, warnings)
    for step in range(1, 101):
        log.write(at(step))
    log.close()
    assert tracker.closed
    assert tracker.steps == list(range(1, 101))
    assert warnings == []


def test_a_run_with_a_failing_tracker_trains_to_its_end(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    given = {"fault": "set_environment", "given": {"TRACKIO_DIR": str(tmp_path / "file" / "below")}}
    output = finish(arguments(data, tmp_path / "run", 3, track="trackio"), tmp_path, **given)
    assert output.count("--track trackio has failed") == 1
    assert len(losses(tmp_path / "run")) == 3


def test_an_unknown_or_missing_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--track aim: expected some of tensorboard, wandb, trackio, mlflow"):
        parse(["--track=wandb,aim"]).check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    for name in set(NAMES) - {"tensorboard"}:
        with pytest.raises(UsageError, match=rf"--track {name} needs .*: pip install 'phi-fast\[{name}\]'"):
            check_trackers([name])


def test_the_tracked_identity_is_kept_and_checked(tmp_path: Path) -> None:
    assert open_trackers(["tensorboard"], tmp_path, {}, pytest.fail) == []
    assert not (tmp_path / "tracked.json").exists()
    (tmp_path / "tracked.json").write_text('{"id": 3}')
    with pytest.raises(UsageError, match=r"tracked\.json.* id is 3.*Remove it to begin another tracked run"):
        open_trackers(["trackio"], tmp_path, {}, pytest.fail)

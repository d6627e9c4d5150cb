"""A step that was killed at any moment goes on with the same command, and ends in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from curation_files import changed, files, step, text, write_lines

from phi_fast.curation import run as running
from phi_fast.curation import surveys, writing
from phi_fast.curation.documents import CurateError
from phi_fast.curation.exact import ExactDuplicates
from phi_fast.curation.near import NearDuplicates
from phi_fast.curation.threshold import Threshold

STEPS: dict[str, Callable[[], Any]] = {
    "exact-dedup": ExactDuplicates,
    "near-dedup": NearDuplicates,
    "threshold": lambda: Threshold("s", 3),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    texts = [text(i % 80) for i in range(90)]
    texts += [changed(text(i), 0.04, i) for i in range(20)]
    records: list[Any] = [{"text": one, "id": f"d{i}", "scores": {"s": i % 7}} for i, one in enumerate(texts)]
    return write_lines(tmp_path / "a.jsonl", [*records[:50], b"{", *records[50:]])


class Killed(BaseException):
    """Stands for a kill: no `except Exception` sees it."""


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("near-dedup", 9),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in STEPS),
    ],
)
def test_an_end_at_any_write_is_resumed(
    name: str, every: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends the process's work at each rename of a file in turn, or at every ninth, and runs the same again."""
    step(STEPS[name](), source, tmp_path / "whole", skip=True)
    whole, rename = files(tmp_path / "whole"), Path.replace
    assert len(whole) == 7
    left = 0

    def failing(self: Path, target: Any) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    for place in range(0, 400, every):
        left = place
        out = tmp_path / f"out{place}"
        try:
            step(STEPS[name](), source, out, skip=True)
        except Killed:
            assert not out.exists()
            left = 10**6
            step(STEPS[name](), source, out, skip=True)
            assert files(out) == whole
            assert not out.with_name(f"{out.name}.partial").exists()
        else:
            break
    assert place > 15  # there were so many places


def test_finished_shards_are_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    filter_shard, survey = writing.filter_shard, surveys.save_ids

    def noted(shard: Any, *arguments: Any, **more: Any) -> Any:
        calls.append(shard.number)
        if len(calls) == 3:
            raise Killed
        return filter_shard(shard, *arguments, **more)

    surveyed: list[Path] = []
    monkeypatch.setattr(running, "filter_shard", noted)
    monkeypatch.setattr(surveys, "save_ids", lambda path, ids: (surveyed.append(path), survey(path, ids))[1])
    with pytest.raises(Killed):
        step(ExactDuplicates(), source, tmp_path / "out", skip=True)
    seen = len(surveyed)
    step(ExactDuplicates(), source, tmp_path / "out", skip=True)
    assert calls[:4] == [0, 1, 2, 2] and sorted(calls[3:]) == list(range(2, seen))
    assert len(surveyed) == seen


def test_workers_do_not_change_a_byte(source: Path, tmp_path: Path) -> None:
    for name, make in STEPS.items():
        step(make(), source, tmp_path / f"{name}1", skip=True)
    step(NearDuplicates(), source, tmp_path / "two", skip=True, workers=2)
    assert files(tmp_path / "two") == files(tmp_path / "near-dedup1")


def test_a_complete_output_is_told_and_another_is_refused(source: Path, tmp_path: Path) -> None:
    first = step(ExactDuplicates(), source, tmp_path / "out", skip=True)
    assert step(ExactDuplicates(), source, tmp_path / "out", skip=True) == first
    with pytest.raises(CurateError, match="another step's output"):
        step(NearDuplicates(), source, tmp_path / "out", skip=True)
    os.utime(source, (1, 1))
    with pytest.raises(CurateError, match="another step's output"):
        step(ExactDuplicates(), source, tmp_path / "out", skip=True)


def test_work_begun_otherwise_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running, "_finish", killed)
        step(Threshold("s", 3), source, tmp_path / "out", skip=True)
    with pytest.raises(CurateError, match=r"out\.partial holds work begun with other settings"):
        step(Threshold("s", 4), source, tmp_path / "out", skip=True)
    step(Threshold("s", 3), source, tmp_path / "out", skip=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_kill_9_at_random_moments(name: str, source: Path, tmp_path: Path) -> None:
    """Real processes, with two workers, killed again and again until one ends by itself."""
    words = {"exact-dedup": "exact-dedup", "near-dedup": "near-dedup", "threshold": "threshold --score s --at-least 3"}[
        name
    ]
    base = [sys.executable, "-m", "phi_fast.curate", *words.split(), str(source), "--skip-malformed", "--workers", "2"]
    base += ["--shard-bytes", "4000"]
    subprocess.run([*base, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    draw, kills = random.Random(0), 0
    limit = 2.0
    while True:
        process = subprocess.Popen(
            [*base, "--out", str(tmp_path / "out")], stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(draw.uniform(0.3, limit))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        limit += 0.7
    assert files(tmp_path / "out") == files(tmp_path / "whole") and kills


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    holder = textwrap.dedent("""
        import sys, pathlib
        from phi_fast.files import Claim
        claim = Claim.take(pathlib.Path(sys.argv[1]) / "lock", "out")
        print("held", flush=True)
        sys.stdin.read()
    """)
    (tmp_path / "out.partial").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "out.partial")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(CurateError, match=f"another curate is writing .* process {other.pid} "):
        step(ExactDuplicates(), source, tmp_path / "out", skip=True)
    other.communicate()
    step(ExactDuplicates(), source, tmp_path / "out", skip=True)

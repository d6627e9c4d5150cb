"""Which results files `benchmarks.report` shows."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import report


def test_a_day_of_make_gpu_is_not_a_file_of_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"machine": {}, "subjects": []}))
    (tmp_path / "b.json").write_text(json.dumps({"machine": {}, "stages": {}}))
    (tmp_path / "c.json").write_text("{")
    assert [file.name for file in report.benchmark_files(tmp_path)] == ["a.json", "c.json"]

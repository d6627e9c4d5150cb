"""datatrove's executors run the stages: processes of this machine, Ray, and Slurm as far as a job script goes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import tiny_tokenizer

pytest.importorskip("datatrove")
pytest.importorskip("zstandard")

from phi_fast.curation.exact import ExactDuplicates
from phi_fast.curation.threshold import Threshold
from phi_fast.data.manifest import Manifest
from phi_fast.data.preparation import pipeline
from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.errors import UsageError
from phi_fast.pipelines import Local, Ray, Slurm, corpus_stages, executors, run
from phi_fast.terminal import console


@pytest.fixture
def given(tmp_path: Path) -> tuple:
    """Inputs, work, out, settings and steps."""
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in").mkdir()
    for i in range(3):
        lines = [{"text": f"text {j % 9} of {i % 2}", "scores": {"quality": j % 4}} for j in range(40)]
        (tmp_path / "in" / f"{i}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [Threshold("quality", 2), ExactDuplicates()]
    settings = Settings(str(tmp_path / "tokenizer.json"), validation=0.1)
    return [tmp_path / "in"], tmp_path / "work", tmp_path / "out", settings, steps


def check(given: tuple, folder: Path) -> None:
    """The corpus is that of `prepare` alone, and has the documents that it should."""
    _, work, out, settings, _ = given
    manifest = prepare([work / "texts-1"], folder / "alone", settings, workers=1, console=console(quiet=True))
    files = sorted(path.name for path in (folder / "alone").iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    for name in files:
        assert (out / name).read_bytes() == (folder / "alone" / name).read_bytes(), name
    assert sum(split.documents for split in manifest.splits.values()) == 2 * 9


@pytest.mark.slow
def test_processes_of_this_machine(tmp_path: Path, given: tuple) -> None:
    stages = corpus_stages(*given, tasks=2, merge_workers=1)
    run(stages, Local(workers=2))
    check(given, tmp_path)
    statistics = json.loads((stages[0].logging / "stats.json").read_text())
    counts = {
        name: value["total"] if isinstance(value, dict) else value for name, value in statistics[1]["stats"].items()
    }
    assert (counts["total"], counts["forwarded"]) == (120, 60)


def test_one_process_fails_goes_on_and_skips_what_is_finished(tmp_path: Path, given: tuple) -> None:
    stages = corpus_stages(*given, merge_workers=1)
    (tmp_path / "work").chmod(0o700)
    (tmp_path / "work" / "texts-0").write_text("in the way")
    with pytest.raises(OSError, match="texts-0"):
        run(stages, Local())
    (tmp_path / "work" / "texts-0").unlink()
    run(stages[:2], Local())
    written = (tmp_path / "work" / "texts-0" / "part-00000000.jsonl.zst").stat().st_mtime_ns
    run(corpus_stages(*given, merge_workers=1), Local())
    assert (tmp_path / "work" / "texts-0" / "part-00000000.jsonl.zst").stat().st_mtime_ns == written
    check(given, tmp_path)


def test_tasks_that_failed_are_named(tmp_path: Path, given: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's executor returns although tasks have failed; here Local's does."""
    from datatrove.executor import LocalPipelineExecutor

    stages = corpus_stages(*given, tasks=3)
    monkeypatch.setattr(LocalPipelineExecutor, "run", lambda self: None)
    with pytest.raises(
        UsageError, match=r"stage 01-filter: 3 of 3 tasks failed, the first is 0\. Their logs are in .*logs"
    ):
        run(stages, Local())


SBATCH = """#!/bin/sh
n=$(ls {folder} | wc -l)
for last; do :; done
cp "$last" {folder}/script-$n
echo "$@" > {folder}/arguments-$n
echo "Submitted batch job 10$n"
"""


def test_slurm_gets_one_job_per_stage_that_depends_on_the_one_before(
    tmp_path: Path, given: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sbatch` is a script here that records what it is given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(folder=tmp_path / "jobs"))
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    stages = corpus_stages(*given, tasks=3)
    cluster = Slurm("cpu", "10:00:00", workers=2, options={"venv_path": "/shared/venv/bin/activate", "qos": "low"})
    made = executors(stages, cluster)
    assert not list((tmp_path / "jobs").iterdir())  # nothing is submitted yet
    assert [executor.depends for executor in made] == [None, *made[:-1]]
    run(stages, cluster)

    scripts = sorted((tmp_path / "jobs").glob("script-*"), key=lambda path: int(path.name[7:]))
    texts = [path.read_text() for path in scripts]
    jobs = {
        match[1]: (text, path.with_name(path.name.replace("script", "arguments")).read_text(), f"10{path.name[7:]}")
        for text, path in zip(texts, scripts, strict=True)
        if "merge_stats" not in text and (match := re.search(r"--job-name=phi_fast-(\S+)", text))
    }
    assert list(jobs) == [stage.name for stage in stages]
    before = None
    for stage in stages:
        text, arguments, job = jobs[stage.name]
        assert text.startswith("#!/bin/bash\n")
        for line in ("--partition=cpu", "--time=10:00:00", "--qos=low", "--mem-per-cpu=2G", "--requeue"):
            assert f"#SBATCH {line}\n" in text
        assert f"#SBATCH --array=0-{'2%2' if stage.tasks == 3 else '0'}\n" in text
        assert f"#SBATCH --cpus-per-task={8 if stage.name.endswith('merge') else 1}\n" in text
        assert "source /shared/venv/bin/activate\n" in text
        assert f"launch_pickled_pipeline {stage.logging}/executor.pik" in text
        assert (stage.logging / "executor.pik").stat().st_size > 0
        assert ("--dependency=afterok:" in arguments) == (before is not None)
        assert before is None or f"--dependency=afterok:{before}" in arguments
        before = job


def test_the_pickled_stages_of_slurm_run(tmp_path: Path, given: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `launch_pickled_pipeline` does on a node, for every task of every stage."""
    import dill
    from datatrove.executor import slurm

    monkeypatch.setattr(slurm, "launch_slurm_job", lambda *_: "1")
    monkeypatch.setattr(slurm, "expand_slurm_nodelist", lambda nodes: [nodes])
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    stages = corpus_stages(*given, tasks=2, merge_workers=1)
    run(stages, Slurm("cpu", "1:00:00"))
    for stage in stages:
        for task in range(stage.tasks):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            with (stage.logging / "executor.pik").open("rb") as file:
                dill.load(file).run()
    check(given, tmp_path)


def test_ray_that_is_missing_or_not_started(given: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = corpus_stages(*given)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"needs ray: pip install 'phi-fast\[ray\]'"):
            executors(stages, Ray())


@pytest.mark.slow
def test_ray_on_this_machine(tmp_path: Path, given: tuple) -> None:
    ray = pytest.importorskip("ray")
    stages = corpus_stages(*given, tasks=2, merge_workers=1)
    with pytest.raises(UsageError, match=r"call ray\.init\(\)"):
        run(stages, Ray())
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        run(stages, Ray(mem_per_cpu_gb=0.2))
    finally:
        ray.shutdown()
    check(given, tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from phi_fast.curation.exact import ExactDuplicates
from phi_fast.curation.threshold import Threshold
from phi_fast.data.preparation import pipeline
from phi_fast.data.preparation.pipeline import Settings
from phi_fast.pipelines import Local, corpus_stages, run

pipeline.MIN_UNIT_BYTES = 2**15
folder = Path(sys.argv[1])
settings = Settings(str(folder / "tokenizer.json"), validation=0.1)
steps = [Threshold("quality", 1), ExactDuplicates()]
print("begun", flush=True)
stages = corpus_stages([folder / "many"], folder / "work", folder / "out", settings, steps, tasks=3, merge_workers=1)
run(stages, Local())
"""


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path: Path, given: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed at later and later moments until it ends; then the corpus is that of `prepare`."""
    rng = random.Random(0)
    (tmp_path / "many").mkdir()
    for i in range(9):
        texts = [" ".join(str(rng.randrange(10**6)) for _ in range(60)) for _ in range(400)]
        lines = [{"text": text, "scores": {"quality": j % 4}} for j, text in enumerate([*texts, *texts[:50]])]
        (tmp_path / "many" / f"{i}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    kills, patience, seen = 0, 0.05, set()
    while True:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            process.stdout.readline()
            try:
                process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with datatrove's helper processes
                kills += 1
                patience += rng.uniform(0.1, 0.5)
                seen.add(len(list((tmp_path / "work" / "logs").glob("*/completions/*"))))
                continue
        assert process.returncode == 0
        break
    assert kills >= 3 and len(seen) >= 2  # in several stages
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 2**15)
    prepare([tmp_path / "work" / "texts-1"], tmp_path / "alone", given[3], workers=1, console=console(quiet=True))
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert sum(split.documents for split in Manifest.read(tmp_path / "out").splits.values()) == 9 * 300

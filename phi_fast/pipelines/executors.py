"""Runs stages with datatrove's executors: processes of this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .stages import Stage


@dataclass(frozen=True)
class Local:
    """Processes of this machine."""

    workers: int = 1
    """Tasks that run at the same time."""

    def executor(self, stage: Stage, before: Any) -> Any:
        """Make datatrove's executor of one stage. before: that of the stage before it, or None."""
        from datatrove.executor import LocalPipelineExecutor

        workers = min(self.workers, stage.tasks)
        return LocalPipelineExecutor(
            list(stage.pipeline), tasks=stage.tasks, workers=workers, logging_dir=str(stage.logging)
        )


@dataclass(frozen=True)
class Ray:
    """A Ray cluster. It must have been started or joined with `ray.init()`; all its machines share a file system."""

    workers: int = -1
    """Tasks that run at the same time; -1 for as many as the cluster has room for."""
    cpus_per_task: int = 1
    mem_per_cpu_gb: float = 2
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `ray.remote`."""

    def executor(self, stage: Stage, before: Any) -> Any:
        """Make datatrove's executor of one stage. Raises UsageError if Ray is missing or was not started."""
        if importlib.util.find_spec("ray") is None:
            raise UsageError("this executor needs ray: pip install 'phi-fast[ray]'")
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        if not ray.is_initialized():
            raise UsageError("Ray is not started here: call ray.init(), or ray.init(address='auto') to join a cluster")
        return RayPipelineExecutor(
            list(stage.pipeline),
            tasks=stage.tasks,
            workers=self.workers,
            logging_dir=str(stage.logging),
            cpus_per_task=self.cpus_per_task,
            mem_per_cpu_gb=self.mem_per_cpu_gb,
            ray_remote_kwargs=dict(self.options),
        )


@dataclass(frozen=True)
class Slurm:
    """A Slurm cluster, whose nodes share a file system: each stage is a job array that depends on the one before."""

    partition: str
    time: str
    """Time limit of a task, as sbatch takes it: "10:00:00"."""
    workers: int = -1
    """Tasks that run at the same time; -1 for no limit."""
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 2
    merge_cpus: int = 8
    """CPUs of the last stage, whose one task merges with a process per CPU."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of datatrove's SlurmPipelineExecutor: qos, venv_path, env_command, sbatch_args, …"""

    def executor(self, stage: Stage, before: Any) -> Any:
        """Make datatrove's executor of one stage, which submits `before` first. Nothing is submitted yet."""
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            list(stage.pipeline),
            tasks=stage.tasks,
            time=self.time,
            partition=self.partition,
            workers=self.workers if stage.tasks > 1 else -1,
            cpus_per_task=self.merge_cpus if stage.name.endswith("-merge") else self.cpus_per_task,
            mem_per_cpu_gb=self.mem_per_cpu_gb,
            job_name=f"phi_fast-{stage.name}",
            logging_dir=str(stage.logging),
            depends=before,
            **self.options,
        )


Cluster = Local | Ray | Slurm


def executors(stages: Sequence[Stage], cluster: Cluster) -> list[Any]:
    """Make datatrove's executors of the stages; under Slurm each depends on the one before. Nothing runs yet."""
    made: list[Any] = []
    for stage in stages:
        made.append(cluster.executor(stage, made[-1] if made else None))
    return made


def run(stages: Sequence[Stage], cluster: Cluster) -> None:
    """Run the stages one after the other, and stop at the first that fails; under Slurm, submit them all and return.

    After an interruption the same call goes on: tasks that are finished are skipped.
    Raises what a task raised (`Local`), or UsageError naming the tasks that failed and their logs.
    """
    made = executors(stages, cluster)
    if isinstance(cluster, Slurm):
        made[-1].run()  # submits the stages before it, and then itself with a dependency on them
        return
    for stage, executor in zip(stages, made, strict=True):
        executor.run()
        # Ray's executor only logs that tasks have failed.
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            raise UsageError(
                f"stage {stage.name}: {len(failed)} of {stage.tasks} tasks failed, the first is {failed[0]}. Their "
                f"logs are in {stage.logging / 'logs'}; when the cause is removed, the same call goes on"
            )

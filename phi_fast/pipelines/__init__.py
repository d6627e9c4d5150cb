"""Curation and preparation past one machine: this project's steps and its corpus writer as blocks of datatrove.

`corpus_stages` lists what is to be done, and `run` does it with an executor of datatrove: `Local`, `Ray` or `Slurm`.
"""

from __future__ import annotations

from .executors import Local, Ray, Slurm, executors, run
from .stages import Stage, corpus_stages

__all__ = ["Local", "Ray", "Slurm", "Stage", "corpus_stages", "executors", "run"]

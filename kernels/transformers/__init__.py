"""The kernels put into Hugging Face models: `accelerate(model)` on an instance, `restore(model)` to take them out."""

from .patch import accelerate, restore
from .report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]

"""The kernels put into Hugging Face models: `accelerate(model)` on an instance, `restore(model)` to take them out."""

try:
    from transformers import AttentionInterface  # noqa: F401
except ImportError as error:
    raise ImportError(
        "accelerate and restore need transformers 5 or newer, with its registry of attentions: pip install "
        "'transformers>=5'"
    ) from error

from .patch import accelerate, restore
from .report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]

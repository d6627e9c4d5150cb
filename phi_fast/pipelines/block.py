"""The base class of the blocks: datatrove's, with a message for where it is not installed."""

from __future__ import annotations

from ..errors import UsageError

try:
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UsageError("phi_fast.pipelines needs datatrove: pip install 'phi-fast[datatrove]'") from error

__all__ = ["PipelineStep", "TheirDocument"]

"""layer_norm by NVIDIA's apex (github.com/NVIDIA/apex, `fused_layer_norm_cuda`), found when it is first asked for.

apex takes contiguous rows and returns weight gradients in the weight's dtype. Adding residuals is torch's, around it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..backend import BackendUnavailable
from ..reference.layer_norm import UNTOUCHED, ResidualStream

_NO_RMS = "rms_norm: backend 'apex' has only layer_norm here; use('auto', op='layer_norm')"


def library(module: str, op: str) -> ModuleType:
    """apex's compiled module of that name. Raises BackendUnavailable where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"{op}: backend 'apex' needs NVIDIA's apex built with its CUDA extensions ({module}), from "
            f"https://github.com/NVIDIA/apex (PyPI's `apex` is another project); or use('auto', op={op!r})"
        ) from error


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    stream: ResidualStream = UNTOUCHED,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Same contract as `reference.layer_norm.forward`."""
    if bias is None:
        raise BackendUnavailable(_NO_RMS)
    kernels = library("fused_layer_norm_cuda", "layer_norm")
    residual, summed, shift, shifted = stream
    if residual is not None:
        x = torch.add(x, residual, out=torch.empty_like(x) if summed is None else summed)
    if shift is not None and shifted is not None:
        torch.add(x, shift, out=shifted)
    result, mean, rstd = kernels.forward_affine(x.contiguous(), x.shape[1:], weight, bias, eps)
    return result if out is None else out.copy_(result), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Same contract as `reference.layer_norm.backward`, but for dweight and dbias, which apex has rounded to the
    weight's dtype."""
    if mean is None:
        raise BackendUnavailable(_NO_RMS)
    kernels = library("fused_layer_norm_cuda", "layer_norm")
    # Where apex keeps the input, not the output, it reads neither the bias nor eps: the weight stands in for the bias.
    arguments = (dy.contiguous(), mean, rstd, x.contiguous(), x.shape[1:], weight, weight, 0.0, False)
    result, dweight, dbias = kernels.backward_affine(*arguments)
    if residual_grad is not None:
        result = result + residual_grad
    return result if dx is None else dx.copy_(result), dweight.to(mean.dtype), dbias.to(mean.dtype)

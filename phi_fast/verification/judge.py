"""Runs a case on each back end and compares its errors against float64 with those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import BackendUnavailable, use
from ..kernels.backend import VENDORS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A computation with the kernels and with plain PyTorch; each maps inputs to named results."""

    op: str
    """A name in `kernels.backend.OPS`, or "model"."""
    name: str
    """The shape and the options, for the table."""
    inputs: Callable[[torch.Generator], Tensors]
    """fp32 (and integer) tensors on the CPU."""
    ours: Callable[[Tensors], Tensors]
    plain: Callable[[Tensors], Tensors]


@dataclass
class Errors:
    """Absolute errors of one result over all its elements."""

    rms: float
    largest: float
    plain_rms: float
    plain_largest: float
    ratio: float
    """rms ÷ plain PyTorch's rms error, or the error of rounding alone if that is larger."""
    largest_ratio: float
    """The same for the largest errors."""


@dataclass
class Verdict:
    """The result of a case on one back end."""

    op: str
    case: str
    dtype: str
    backend: str
    status: str
    """"ok", "fail", or "not run"."""
    detail: str = ""
    """Why it failed or did not run."""
    errors: dict[str, Errors] = field(default_factory=dict)
    """Errors by result."""

    @property
    def worst(self) -> str | None:
        """The result with the largest ratio to plain PyTorch's error."""
        return max(self.errors, key=lambda name: self.errors[name].ratio, default=None)


def cast(inputs: Tensors, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Copy tensors to `device`, floating-point ones to `dtype`."""
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True) for name, x in inputs.items()}


def differentiate(function: Callable[..., Tensor]) -> Callable[[Tensors], Tensors]:
    """Wrap `function`: inputs -> {"out": its result, "d<input>": gradient for a fixed random output gradient}."""

    def evaluate(inputs: Tensors) -> Tensors:
        leaves = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
        out = function(**leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out) if out.ndim else None
        wanted = [name for name, x in leaves.items() if x.is_floating_point()]
        grads = torch.autograd.grad(out, [leaves[name] for name in wanted], dout)
        return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}

    return evaluate


def judge(case: Case, dtype: torch.dtype, device: torch.device, backends: list[str], factor: float) -> list[Verdict]:
    """Run `case` on each of `backends`.

    A case passes if its root mean square errors are at most `factor` times plain PyTorch's, its largest errors at most
    twice that, infinities are only where float64 has them, and two runs agree bit for bit.
    """
    inputs = case.inputs(torch.Generator().manual_seed(0))
    exact = case.plain(cast(cast(inputs, dtype, device), torch.float64, device))
    plain = case.plain(cast(inputs, dtype, device))
    verdicts = []
    for backend in backends:
        verdict = Verdict(case.op, case.name, str(dtype).removeprefix("torch."), backend, "ok")
        verdicts.append(verdict)
        try:
            with _chosen(backend, case.op):
                actual, again = (case.ours(cast(inputs, dtype, device)) for _ in range(2))
        except Exception as error:  # any failure to compile or launch is a result
            unavailable = isinstance(error, BackendUnavailable) or backend.partition(":")[0] in VENDORS
            verdict.status = "not run" if unavailable else "fail"  # other libraries' kernels have their own limits
            verdict.detail = str(error) if unavailable else f"{type(error).__name__}: {error}"
            continue
        verdict.errors = {name: _errors(actual[name], plain[name], exact[name], dtype) for name in exact}
        faults = [f"{name}: {fault}" for name in exact if (fault := _fault(verdict.errors[name], factor))]
        faults += [f"{name}: two runs differ" for name in actual if not torch.equal(actual[name], again[name])]
        if faults:
            verdict.status, verdict.detail = "fail", "; ".join(faults)
    return verdicts


def _chosen(backend: str, op: str) -> AbstractContextManager:
    if op != "model":
        return use(backend, op=op)
    name, _, one_op = backend.partition(":")  # the whole model with another library's attention: "sdpa:attention"
    return use(name, op=one_op or None)


def _errors(actual: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> Errors:
    def rms_and_largest(x: Tensor) -> tuple[float, float]:
        difference = (x.double() - exact).abs()
        difference = difference.where(torch.isfinite(exact) | torch.isfinite(x), 0.0)
        return difference.square().mean().sqrt().item(), difference.max().item()

    rms, largest = rms_and_largest(actual)
    plain_rms, plain_largest = rms_and_largest(plain)
    rounding_rms, rounding_largest = rms_and_largest(exact.to(plain.dtype))
    if exact.ndim == 0:  # a scalar's error may be small by chance: allow half a unit in its last place, in `dtype`
        rounding_rms = rounding_largest = max(rounding_rms, torch.finfo(dtype).eps / 2 * abs(exact.item()))
    tiny = torch.finfo(torch.float64).tiny
    ratio = rms / max(plain_rms, rounding_rms, tiny)
    return Errors(rms, largest, plain_rms, plain_largest, ratio, largest / max(plain_largest, rounding_largest, tiny))


def _fault(errors: Errors, factor: float) -> str:
    if not errors.ratio <= factor:  # NaN too
        return f"error {errors.rms:.2e}, plain PyTorch {errors.plain_rms:.2e}"
    if not errors.largest_ratio <= 2 * factor:
        return f"largest error {errors.largest:.2e}, plain PyTorch {errors.plain_largest:.2e}"
    return ""

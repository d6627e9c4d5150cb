"""How the kernels' tests judge a result: its error against float64, compared with plain PyTorch's error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(root mean square, largest) absolute error over the entries that are finite in `exact`."""
    finite = exact.isfinite()
    difference = (actual.double() - exact)[finite]
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.square().mean().sqrt().item(), difference.abs().max().item()


def assert_no_worse(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "", factor: float = 2.0) -> None:
    """Asserts that the error of `actual` against `exact` (float64) is at most `factor` times that of `plain`, both in
    root mean square and at its largest.

    `plain` is plain PyTorch's result for the same inputs at the same dtype. If its error happens to be less than that
    of `exact` rounded to that dtype (by chance, with few entries), the rounding error is used instead. NaN and inf must
    be where `exact`, rounded to that dtype, has them.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}"
    exact = exact.detach()
    rounded = exact.to(actual.dtype).double()
    assert_same_nonfinite(actual, rounded, what)
    exact = torch.where(rounded.isfinite(), exact, rounded)
    ours, theirs, floor = (errors(x.detach(), exact) for x in (actual, plain, rounded))
    for norm, a, b, c in zip(("root mean square", "largest"), ours, theirs, floor, strict=True):
        limit = factor * max(b, c)
        assert a <= limit, f"{what}: {norm} error {a:.3e}, plain PyTorch {b:.3e}, rounding alone {c:.3e}"


def assert_same_nonfinite(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Asserts that NaN, +inf and -inf are at the same places."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        a, b = test(actual.detach()), test(expected.detach())
        assert torch.equal(a, b), f"{what}: {name} at {int(a.sum())} places, expected {int(b.sum())} (or other places)"


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    """{"out": function(**inputs), name: its gradient for `dout`}. Inputs become new leaves of the same strides."""
    leaves = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x).requires_grad_()
        for name, x in inputs.items()
    }
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out))  # also to the device of out
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64."""
    return {name: x.double() for name, x in inputs.items()}


def backends(device: str) -> tuple[str, ...]:
    """The back ends that every op of this library has here. Without a GPU, Triton's kernels run in its interpreter."""
    return ("reference", "triton") if device == "cuda" else ("reference", "triton", "cpp")

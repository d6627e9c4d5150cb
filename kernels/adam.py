"""Adam and AdamW in one pass over many tensors: unscale, clip and skip are read from device scalars in that pass.

`adam_step_` steps lists of tensors, such as the pieces of a flat ZeRO partition; `FusedAdam` (`fused_adam.py`) is the
optimizer. `grad_norm_squared` and `unscale_and_clip` compute the scalars that control both. None waits for the GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backend
from .local_parts import local_part, placed, scalar, sum_over_shards, without_partial
from .reference.adam import AdamLists, AdamOptions

PARAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None = None,
    *,
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_correction: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """One AdamW step (`decoupled`; else Adam with an L2 penalty) on lists of tensors of any shapes, in place.

    params: one dtype of fp32, fp16, bf16. grads: one of these too, or another. exp_avgs, exp_avg_sqs: fp32.
    masters: fp32 copies that are stepped, then rounded into the 16-bit params; None: the params are stepped themselves.
    All contiguous, or with the strides of their parameter, whose memory has no gaps (channels_last). The other tensors
    of a DTensor parameter must be DTensors with its placement; each rank steps its local part.
    step: fp32 scalar tensor, how many steps were taken so far; counted up here.
    lr: a float, or an fp32 scalar tensor on the device (then a CUDA graph can replay with another value).
    bias_correction: divide the moments by 1 - β^t, as Adam does; False: take them as they are.
    grad_scale: fp32 scalar tensor that every gradient is multiplied by: 1 / (loss scale × clip factor).
    found_inf: fp32 scalar tensor; where it is not 0 nothing changes: no tensor, and not `step`.
    nonfinite: fp32 scalar tensor on the device, set to 1 where a weight as it is stored, or a moment, is not finite
        after the step, else left as it was. It is found in the same pass, without waiting for the GPU.
    Autograd sees what is written: a backward pass that still needs the old params raises, as after torch.optim's step.
    Raises ValueError for lists whose tensors do not fit together, or that have no memory (FakeTensor, meta).
    """
    grad_scale, found_inf = scalar(grad_scale), scalar(found_inf)
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([] if masters is None else [masters])]
    if torch.compiler.is_compiling():
        checked(*lists)
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, device=step.device)
        options = (decoupled, grad_scale, found_inf, bias_correction, nonfinite)
        _adam_step_op(*map(list, (*lists, ())[:5]), step, lr, *betas, eps, weight_decay, *options)
        return
    views = checked(*local_lists(*lists))
    count(step, found_inf)
    launch(
        views,
        AdamOptions(step, lr, betas, eps, weight_decay, decoupled, bias_correction, grad_scale, found_inf, nonfinite),
    )
    mark_written(params, *lists[2:], [] if nonfinite is None else [nonfinite])


def grad_norm_squared(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum of squares of every element of one gradient or many: an fp32 scalar tensor on their device.

    grads: fp32, fp16 or bf16, without gaps in memory. Not finite where any element is not finite: it is the overflow
    check too. Deterministic. For DTensors it is the squared norm of the whole gradient, the same on every rank: a
    collective in which all ranks of their mesh must take part. For other partial tensors, such as a ZeRO partition, it
    covers this rank's part: sum it over the ranks before taking the root. Raises ValueError for other grads.
    """
    grads = [grads] if isinstance(grads, Tensor) else list(grads)
    if not grads:
        raise ValueError("grads is empty: the norm of no gradient has no device")
    device = grads[0].device
    together: dict[Hashable, list[Tensor]] = defaultdict(list)
    for i, grad in enumerate(grads):
        grad = without_partial(grad)
        part = local_part(f"grads[{i}]", grad)
        view = in_memory_order(part, part)
        if part.dtype not in PARAM_DTYPES or not view.is_contiguous() or part.device != device:
            raise ValueError(
                f"grads[{i}] is {part.dtype} with strides {part.stride()} on {part.device}: expected contiguous, on "
                f"{device}, and one of {', '.join(map(str, PARAM_DTYPES))}"
            )
        together[placed(grad)].append(view)
    kernels = _kernels(device)
    squares = [sum_over_shards(kernels.grad_norm_squared(parts), where) for where, parts in together.items()]
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum()


def unscale_and_clip(
    norm_squared: Tensor, *, loss_scale: float | Tensor = 1.0, max_norm: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_scale, found_inf, norm) for `adam_step_`, from the squared norm of the gradients as they are stored.

    loss_scale: the factor on the loss when these gradients were computed. max_norm: the norm of the unscaled
    gradients is clipped to it; None: no clipping. All three are fp32 scalar tensors on the device; norm is unscaled and
    unclipped.
    """
    norm = norm_squared.float().sqrt() / loss_scale
    clip = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1.0)
    found_inf = torch.logical_not(torch.isfinite(norm_squared)).float()
    return 1.0 / (clip * loss_scale), found_inf, norm


def _named(lists: Sequence[Sequence[Tensor]]) -> list[tuple[str, Sequence[Tensor]]]:
    return list(zip(_LISTS[: len(lists)], lists, strict=True))  # torch 2.8 compiles strict=False as if it were True


def local_lists(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """`adam_step_`'s lists, in its order, with the local part of every DTensor in its place."""
    for name, tensors in _named(lists):
        for i, (tensor, param) in enumerate(zip(tensors, lists[0], strict=False)):
            if placed(tensor) != placed(param):
                raise ValueError(
                    f"{name}[{i}] is placed {placed(tensor)} and params[{i}] {placed(param)} (None: not a DTensor): "
                    "expected both alike; redistribute one"
                )
    return [[local_part(f"{name}[{i}]", tensor) for i, tensor in enumerate(tensors)] for name, tensors in _named(lists)]


def checked(*lists: Sequence[Tensor]) -> AdamLists:
    """The same lists as contiguous views, in the order in which each parameter lies in memory. Raises ValueError."""
    if not lists[0]:
        raise ValueError("params is empty: a step needs at least one tensor")
    params, grads, exp_avgs, exp_avg_sqs, *masters = (_checked_list(*named, lists[0]) for named in _named(lists))
    return AdamLists(params, grads, exp_avgs, exp_avg_sqs, masters[0] if masters else None)


def _checked_list(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    if len(tensors) != len(params):
        raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}: expected as many")
    allowed = PARAM_DTYPES if name in ("params", "grads") else (torch.float32,)
    views = []
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor.numel() != param.numel() or tensor.device != params[0].device:
            raise ValueError(
                f"{name}[{i}] is {tuple(tensor.shape)} on {tensor.device}, not the {param.numel()} elements of "
                f"params[{i}] on {params[0].device}"
            )
        view = in_memory_order(tensor, param)
        if not view.is_contiguous():
            expected = "contiguous; call .contiguous()"
            if name != "params" and not param.is_contiguous():
                expected = f"the strides {param.stride()} of params[{i}]"
            raise ValueError(f"{name}[{i}] has strides {tensor.stride()}: expected {expected}")
        if tensor.dtype not in allowed or tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name}[{i}] is {tensor.dtype}, not {' or '.join(map(str, allowed))}, the same in the whole list"
            )
        views.append(view)
    return views


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of `tensor`, which is contiguous where it has the strides of `like` and memory without gaps."""
    if like.is_contiguous() or tensor.shape != like.shape:
        return tensor
    return tensor.permute(sorted(range(like.dim()), key=like.stride, reverse=True))


def count(step: Tensor, found_inf: Tensor | None) -> None:
    """Count a step that is not skipped."""
    step.add_(1 if found_inf is None else (found_inf == 0))


def launch(lists: AdamLists, options: AdamOptions) -> None:
    """Run the step on `checked` lists."""
    device = lists.params[0].device
    for name, value in options._asdict().items():
        if isinstance(value, Tensor) and (value.numel() != 1 or value.device != device):
            raise ValueError(f"{name} is {tuple(value.shape)} on {value.device}: expected one element on {device}")
    with torch.no_grad():
        _kernels(device).step_(lists, options)


def mark_written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd, which does not see a kernel write. Tensors made in inference mode have no version to raise."""
    increment_version([tensor for tensors in lists for tensor in tensors])


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "meta":
        raise ValueError("adam: these tensors are on the meta device and have no memory; move them with .to_empty()")
    return backend.implementation("adam", device)


@torch.library.custom_op(
    "phi_fast::adam_step_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters", "step", "nonfinite")
)
def _adam_step_op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    bias_correction: bool,
    nonfinite: Tensor | None,  # no default: torch 2.8 looks for a written argument among those that were given
) -> None:
    """`adam_step_` as an operator that torch.compile keeps whole; no masters is an empty list."""
    count(step, found_inf)
    options = (
        step,
        lr,
        (beta1, beta2),
        eps,
        weight_decay,
        decoupled,
        bias_correction,
        grad_scale,
        found_inf,
        nonfinite,
    )
    launch(checked(params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])), AdamOptions(*options))


@_adam_step_op.register_fake
def _(*_: Any) -> None:
    return None

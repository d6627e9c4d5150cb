"""Adam and AdamW in one pass over many tensors: unscale, clip and skip are read from device scalars in that pass.

`FusedAdam` is the optimizer. `adam_step_` is its step on lists, as of pieces of a flat ZeRO partition;
`grad_norm_squared` and `unscale_and_clip` make the scalars that steer it. None waits for the GPU.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend

PARAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """One AdamW step (`decoupled`; else Adam with an L2 penalty) on lists of tensors of any shapes, in place.

    params: contiguous, one dtype of fp32, fp16, bf16. grads: likewise, maybe another. exp_avgs, exp_avg_sqs: fp32.
    masters: fp32 copies that are stepped, then rounded into the 16-bit params; None: the params are stepped themselves.
    step: fp32 scalar tensor, how many steps were taken so far; counted up here.
    lr: a float, or an fp32 scalar tensor on the device (then a CUDA graph can replay with another value).
    grad_scale: fp32 scalar tensor that every gradient is multiplied by: 1 / (loss scale × clip factor).
    found_inf: fp32 scalar tensor; where it is not 0 nothing changes: no tensor, and not `step`.
    nonfinite: fp32 scalar tensor on the device, set to 1 where a weight as it is stored, or a moment, is not finite
        after the step, else left as it was. It comes from the same pass and makes nobody wait.
    Raises ValueError for lists whose tensors do not fit together.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, masters)
    options = (step, lr, betas, eps, weight_decay, decoupled, grad_scale, found_inf, nonfinite)
    if torch.compiler.is_compiling():
        lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(masters or ()))
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, device=step.device)
        _adam_step_op(*lists, step, lr, *betas, eps, weight_decay, decoupled, grad_scale, found_inf, nonfinite)
        return
    _count(step, found_inf)
    _launch(params, grads, exp_avgs, exp_avg_sqs, masters, *options)


def grad_norm_squared(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum of squares of every element of one gradient or many: an fp32 scalar tensor on their device.

    grads: contiguous, fp32, fp16 or bf16. Not finite where any element is not finite: it is the overflow check too.
    Deterministic. Sum it over ranks before the root where gradients are sharded. Raises ValueError for other grads.
    """
    grads = [grads] if isinstance(grads, Tensor) else list(grads)
    if not grads:
        raise ValueError("grads is empty: the norm of no gradient has no device")
    for i, grad in enumerate(grads):
        if grad.dtype not in PARAM_DTYPES or not grad.is_contiguous() or grad.device != grads[0].device:
            raise ValueError(
                f"grads[{i}] is {grad.dtype} with strides {grad.stride()} on {grad.device}: expected contiguous, on "
                f"{grads[0].device}, and one of {', '.join(map(str, PARAM_DTYPES))}"
            )
    return backend.implementation("adam", grads[0].device).grad_norm_squared(grads)


def unscale_and_clip(
    norm_squared: Tensor, *, loss_scale: float | Tensor = 1.0, max_norm: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_scale, found_inf, norm) for `adam_step_`, from the squared norm of the gradients as they are stored.

    loss_scale: what the loss was multiplied by when THESE gradients were formed. max_norm: the norm of the unscaled
    gradients is clipped to it; None: no clipping. All three are fp32 scalar tensors on the device; norm is unscaled and
    unclipped.
    """
    norm = norm_squared.float().sqrt() / loss_scale
    clip = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1.0)
    found_inf = torch.logical_not(torch.isfinite(norm_squared)).float()
    return 1.0 / (clip * loss_scale), found_inf, norm


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
) -> None:
    if not params:
        raise ValueError("params is empty: a step needs at least one tensor")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if masters is not None:
        lists["masters"] = masters
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}: expected as many")
        allowed = PARAM_DTYPES if name in ("params", "grads") else (torch.float32,)
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.numel() != param.numel() or tensor.device != params[0].device:
                raise ValueError(
                    f"{name}[{i}] is {tuple(tensor.shape)} on {tensor.device}, not the {param.numel()} elements of "
                    f"params[{i}] on {params[0].device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] has strides {tensor.stride()}: expected contiguous; call .contiguous()")
            if tensor.dtype not in allowed or tensor.dtype != tensors[0].dtype:
                raise ValueError(
                    f"{name}[{i}] is {tensor.dtype}, not {' or '.join(map(str, allowed))}, the same in the whole list"
                )


def _count(step: Tensor, found_inf: Tensor | None) -> None:
    step.add_(1 if found_inf is None else (found_inf == 0))


def _launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    nonfinite: Tensor | None = None,
) -> None:
    with torch.no_grad():
        backend.implementation("adam", params[0].device).step_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            masters,
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            grad_scale=grad_scale,
            found_inf=found_inf,
            nonfinite=nonfinite,
        )


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
    nonfinite: Tensor | None = None,
) -> None:
    """`adam_step_` as an operator that torch.compile keeps whole; no masters is an empty list."""
    _count(step, found_inf)
    state = (params, grads, exp_avgs, exp_avg_sqs, masters or None)
    _launch(*state, step, lr, (beta1, beta2), eps, weight_decay, decoupled, grad_scale, found_inf, nonfinite)


@_adam_step_op.register_fake
def _(*_: Any) -> None:
    return None


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam) that steps every parameter of a group in one launch, with the trajectory of torch.optim's.

    params: fp32, fp16 or bf16 parameters, or groups. Gradients may have another of these dtypes.
    lr: learning rate, a float or an fp32 scalar on the device. betas, eps, weight_decay: as in torch.optim.AdamW.
    decoupled_weight_decay: True for AdamW (arXiv 1711.05101), False for Adam with an L2 penalty (arXiv 1412.6980).
    master_weights: keep an fp32 copy of each 16-bit parameter (state "master"), step that, and round it.
        Without it a 16-bit parameter is stepped in fp32 and rounded, and loses updates below half its last bit.

    State: "exp_avg" and "exp_avg_sq" (fp32 whatever the parameter is), "step" (fp32 scalar tensor on the parameter's
    device) and "master": torch's names, so state dicts of torch.optim.AdamW and Adam load here and the other way round.
    Parameters that have always been stepped together share one "step" tensor.

    Capturable in a CUDA graph as it is: take one step before capturing (it makes the state), keep the gradients' memory
    (`zero_grad(set_to_none=False)`), and give lr as a tensor if it is to change. Works with torch.amp.GradScaler, whose
    scale is then divided out inside the step.

    Raises ValueError for an option out of range, a parameter of another dtype or not contiguous, a sparse gradient.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands grad_scale and found_inf to the step

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decoupled_weight_decay: bool = True,
        master_weights: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim.Optimizer does, after checking its options and parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not isinstance(group[name], Tensor) and not group[name] >= 0:
                raise ValueError(f"{name}={group[name]}: expected a value >= 0")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']}: expected two values in [0, 1)")
        for p in group["params"]:
            if p.dtype not in PARAM_DTYPES or not p.is_contiguous():
                raise ValueError(
                    f"parameter {tuple(p.shape)} is {p.dtype} with strides {p.stride()}: expected contiguous "
                    f"and one of {', '.join(map(str, PARAM_DTYPES))}"
                )

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Step every parameter that has a gradient; returns what `closure` returned.

        grad_scale, found_inf: as in `adam_step_`; `unscale_and_clip` makes them. Gradients are read, not changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = self._amp_scalars(grad_scale, found_inf)
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            self._initialise(group, active)
            for step, together in self._by_step(group, active):
                _count(step, found_inf)
                for params in _by_dtype(together):
                    self._launch(group, params, step, grad_scale, found_inf)
        return loss

    def _amp_scalars(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The scalars given, or those torch.amp.GradScaler left on the optimizer; its scale is a divisor."""
        divisor = getattr(self, "grad_scale", None)
        if divisor is not None:
            grad_scale = 1.0 / divisor if grad_scale is None else grad_scale / divisor
        return grad_scale, getattr(self, "found_inf", None) if found_inf is None else found_inf

    def _initialise(self, group: dict[str, Any], params: list[Tensor]) -> None:
        first: dict[torch.device, Tensor] = {}
        for p in params:
            state = self.state[p]
            if "step" not in state:
                if p.device not in first:
                    first[p.device] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = first[p.device]
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            if group["master_weights"] and p.dtype != torch.float32 and "master" not in state:
                state["master"] = p.detach().float()

    def _by_step(self, group: dict[str, Any], active: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """`active` by the step tensor they share. Where others share it too and sit this step out, the active ones get
        their own count: it is known on the host who takes part, though not whether an overflow skips the step."""
        sharing = Counter(id(self.state[p]["step"]) for p in group["params"] if "step" in self.state.get(p, {}))
        together: dict[int, list[Tensor]] = defaultdict(list)
        for p in active:
            together[id(self.state[p]["step"])].append(p)
        result = []
        for key, params in together.items():
            step = self.state[params[0]]["step"]
            if len(params) < sharing[key]:
                step = step.clone()
                for p in params:
                    self.state[p]["step"] = step
            result.append((step, params))
        return result

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        step: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        states = [self.state[p] for p in params]
        masters = [state["master"] for state in states] if "master" in states[0] else None
        grads = []
        for p in params:
            if p.grad.is_sparse:  # type: ignore[union-attr]
                raise ValueError(f"a parameter of shape {tuple(p.shape)} has a sparse gradient: expected a dense one")
            grads.append(p.grad.contiguous())  # type: ignore[union-attr]
        lists = (
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            masters,
        )
        _check(*lists)
        options = (group["lr"], group["betas"], group["eps"], group["weight_decay"], group["decoupled_weight_decay"])
        _launch(*lists, step, *options, grad_scale, found_inf)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # torch.optim.AdamW's state dicts do not have it
            group.setdefault("master_weights", self.defaults["master_weights"])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's, with a "step" of its own for every parameter: torch.optim counts each one up."""
        result = super().state_dict()
        for index, state in result["state"].items():
            if "step" in state:
                result["state"][index] = {**state, "step": state["step"].clone()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of FusedAdam, torch.optim.AdamW or torch.optim.Adam; the state is copied."""
        super().load_state_dict(state_dict)
        # torch casts the state to the parameter's dtype, leaves "step" where it was, and shares memory with the dict.
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        steps: dict[tuple[torch.device, float], Tensor] = {}
        for index, p in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(index)
            if saved is None:
                continue
            for key in ("exp_avg", "exp_avg_sq", "master"):
                if key in saved:
                    self.state[p][key] = saved[key].to(device=p.device, dtype=torch.float32, copy=True).contiguous()
            taken = (p.device, float(saved["step"]))
            if taken not in steps:
                steps[taken] = torch.full((), taken[1], dtype=torch.float32, device=p.device)
            self.state[p]["step"] = steps[taken]


def _by_dtype(params: list[Tensor]) -> list[list[Tensor]]:
    """`params` (of one device) in lists of one parameter dtype and one gradient dtype: a launch each."""
    lists: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = defaultdict(list)
    for p in params:
        lists[p.dtype, p.grad.dtype].append(p)  # type: ignore[union-attr]
    return list(lists.values())

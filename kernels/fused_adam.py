"""FusedAdam, the optimizer: its options, state and state dicts. The arithmetic is `adam.py`'s."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .adam import PARAM_DTYPES, checked, count, in_memory_order, launch, mark_written
from .local_parts import local_part, placed, placed_as, scalar
from .reference.adam import AdamOptions
from .steady import Steady, Work

TORCHS = {
    "amsgrad": (False,),
    "maximize": (False,),
    "differentiable": (False,),
    "foreach": (None, False, True),
    "fused": (None, True),
    "capturable": (False, True),
}
"""Keywords of torch.optim.AdamW that FusedAdam takes, and their values that it keeps to. It is fused and capturable
whatever they say; `foreach` would choose between loops of which it has none."""


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam) that steps every parameter of a group in one launch, with the trajectory of torch.optim's.

    params: fp32, fp16 or bf16 parameters, or groups. Gradients may have another of these dtypes.
    lr: learning rate, a float or an fp32 scalar on the device. betas, eps, weight_decay: as in torch.optim.AdamW.
    decoupled_weight_decay: True for AdamW (arXiv 1711.05101), False for Adam with an L2 penalty (arXiv 1412.6980).
    bias_correction: divide the moments by 1 - β^t; False: take them as they are, as NVIDIA's apex does then.
    master_weights: keep an fp32 copy of each 16-bit parameter (state "master"), step that, and round it.
        Without it a 16-bit parameter is stepped in fp32 and rounded, and loses updates below half its last bit.
    amsgrad, maximize, differentiable: torch's keywords, at torch's defaults only (False).
    foreach, fused, capturable: torch's keywords, which choose among its implementations and change no result: any value
        but fused=False, which this is not.

    Parameters may have any strides without gaps in memory (channels_last), and may be DTensors, as FSDP2 makes them:
    each rank steps its local part, the state is made of DTensors placed like the parameter, and
    torch.distributed.checkpoint's `get_optimizer_state_dict` and `set_optimizer_state_dict` work as with torch's AdamW.

    State: "exp_avg" and "exp_avg_sq" (fp32 whatever the parameter is), "step" (fp32 scalar tensor on the parameter's
    device) and "master": torch's names, so state dicts of torch.optim.AdamW and Adam load here and the other way round.
    Parameters that have always been stepped together share one "step" tensor.

    Capturable in a CUDA graph as it is: take one step before capturing (it makes the state), keep the gradients' memory
    (`zero_grad(set_to_none=False)`), and give lr as a tensor if it is to change. Works with torch.amp.GradScaler, whose
    scale is then divided out inside the step.

    Raises ValueError for an option out of range; for a parameter of another dtype, with gaps in memory, or of another
    tensor subclass than DTensor; for a sparse gradient; for a state dict that does not fit.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands grad_scale and found_inf to the step

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        bias_correction: bool = True,
        master_weights: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "master_weights": master_weights,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "differentiable": differentiable,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        self._steady: dict[int, Steady] = {}
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
        for name, values in TORCHS.items():
            _refuse_unless(group, name, values)
        for p in group["params"]:
            part = local_part(f"parameter {tuple(p.shape)}", p)
            if part.dtype not in PARAM_DTYPES or not in_memory_order(part, part).is_contiguous():
                raise ValueError(
                    f"parameter {tuple(p.shape)} is {p.dtype} with strides {part.stride()}: expected contiguous, or "
                    f"without gaps in memory, and one of {', '.join(map(str, PARAM_DTYPES))}"
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
        for number, group in enumerate(self.param_groups):
            steady = self._steady.get(number)
            if steady is not None and steady.holds(group, self.state):
                steps = steady.steps
            else:
                steps = self._look(group)
                self._steady[number] = Steady(group, self.state, steps)
            for step, works in steps:
                count(step, found_inf)
                for work in works:
                    launch(work.now(), _options(group, step, grad_scale, found_inf))
                    mark_written(work.params, *work.states)
        return loss

    def _look(self, group: dict[str, Any]) -> list[tuple[Tensor, list[Work]]]:
        """The launches of a step of `group`, by the step tensor they share; makes the state and checks the tensors."""
        active = [p for p in group["params"] if p.grad is not None]
        self._initialise(group, active)
        together = self._by_step(group, active)
        return [(step, [self._work(params) for params in _by_dtype(sharing)]) for step, sharing in together]

    def _amp_scalars(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The scalars given, or those torch.amp.GradScaler left on the optimizer; its scale is a divisor."""
        divisor = getattr(self, "grad_scale", None)
        if divisor is not None:
            grad_scale = 1.0 / divisor if grad_scale is None else grad_scale / divisor
        return scalar(grad_scale), scalar(getattr(self, "found_inf", None) if found_inf is None else found_inf)

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

    def _work(self, params: list[Tensor]) -> Work:
        names = ("exp_avg", "exp_avg_sq", "master") if "master" in self.state[params[0]] else ("exp_avg", "exp_avg_sq")
        states = [[self.state[p][name] for p in params] for name in names]
        parts = [local_part("a parameter", p) for p in params]
        grads = [_gradient(p, part) for p, part in zip(params, parts, strict=True)]
        local_states = [[local_part("a state", state) for state in together] for together in states]
        return Work(checked(parts, grads, *local_states), params, states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steady = {}
        for group in self.param_groups:  # a state dict of torch.optim.AdamW, or an older one, lacks some
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The state of torch.optim.Optimizer, with a "step" of its own for every parameter: torch.optim counts each one
        up."""
        result = super().state_dict()
        for index, state in result["state"].items():
            if "step" in state:
                result["state"][index] = {**state, "step": state["step"].clone()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of FusedAdam, torch.optim.AdamW or torch.optim.Adam; the state is copied.

        Raises ValueError, before anything is changed, where the saved optimizer did what this one does not (amsgrad,
        maximize), or a state does not have its parameter's shape or placement.
        """
        self._refuse(state_dict)
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
                    self.state[p][key] = torch.empty_like(p, dtype=torch.float32, requires_grad=False)
                    self.state[p][key].copy_(saved[key])
            taken = (p.device, float(saved["step"]))
            if taken not in steps:
                steps[taken] = torch.full((), taken[1], dtype=torch.float32, device=p.device)
            self.state[p]["step"] = steps[taken]

    def _refuse(self, state_dict: dict[str, Any]) -> None:
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for name in ("amsgrad", "maximize"):
                _refuse_unless(saved_group, name, TORCHS[name])
            for index, p in zip(saved_group["params"], group["params"], strict=False):
                for name in ("exp_avg", "exp_avg_sq", "master"):
                    saved = state_dict["state"].get(index, {}).get(name)
                    if saved is not None and (saved.shape != p.shape or placed(saved) != placed(p)):
                        raise ValueError(
                            f"the saved {name} of parameter {index} is {tuple(saved.shape)}, placed {placed(saved)}: "
                            f"expected {tuple(p.shape)}, placed {placed(p)} (None: not a DTensor); for a sharded model "
                            "load with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                        )


def _options(group: dict[str, Any], step: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> AdamOptions:
    return AdamOptions(
        step,
        group["lr"],
        group["betas"],
        group["eps"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["bias_correction"],
        grad_scale,
        found_inf,
    )


def _refuse_unless(group: dict[str, Any], name: str, values: tuple) -> None:
    if name in group and group[name] not in values:
        raise ValueError(
            f"{name}={group[name]!r}: FusedAdam takes {' or '.join(map(repr, values))}; use torch.optim.AdamW"
        )


def _gradient(p: Tensor, part: Tensor) -> Tensor:
    """The local part of p's gradient, laid out in memory as `part`, the parameter's own."""
    grad = p.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} has a sparse gradient: expected a dense one")
    grad = local_part(f"the gradient of a parameter of shape {tuple(p.shape)}", placed_as(grad, p))
    if in_memory_order(grad, part).is_contiguous():
        return grad
    return torch.empty_like(part, dtype=grad.dtype).copy_(grad)


def _by_dtype(params: list[Tensor]) -> list[list[Tensor]]:
    """`params` (of one device) in lists of one parameter dtype and one gradient dtype: a launch each."""
    lists: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = defaultdict(list)
    for p in params:
        lists[p.dtype, p.grad.dtype].append(p)  # type: ignore[union-attr]
    return list(lists.values())

"""AdamW over 50 M parameters: fp32 as every library steps it, and the whole update that a 16-bit model needs.

Bytes a parameter: fp32 28 (gradient read; weight, m, v read and written). The whole update 30: the 16-bit gradient read
for its norm and again; master, m, v read and written; the 16-bit weight written. Peers do the latter in passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Contender, Results, compare
from benchmarks.ops import Cost, bounds
from benchmarks.peers import NOT_COMPILED, absent, backends
from benchmarks.timing import device
from phi_fast.distributed import deepspeed
from phi_fast.kernels import FusedAdam, use
from phi_fast.kernels.adam import adam_flat_, grad_norm_squared, unscale_and_clip

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}
CLIP = 1.0
Step = Callable[[], object]


def parameter(n: int, grad: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(n, device=grad.device))
    made.grad = grad
    return made


def deepspeed_adam(params: list[nn.Parameter], full: bool) -> torch.optim.Optimizer | str:
    """Its optimizer, or why there is none. On a CPU its constructor compiles it, a minute when it is first made."""
    if not full:
        return "compiled in the full run only"
    kind = params[0].device.type
    deepspeed(kind)
    try:
        if kind == "cuda":
            from deepspeed.ops.adam import FusedAdam as DeepSpeedFusedAdam

            return DeepSpeedFusedAdam(params, **OPTIONS)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, **OPTIONS)
    except Exception as error:  # whatever a compiler may raise is the row
        return f"does not build here: {type(error).__name__}: {str(error).splitlines()[0][:100]}"


def apex_step(params: list[nn.Parameter]) -> Step | str:
    reason = absent("amp_C")
    if reason:
        return reason
    optimizer = FusedAdam(params, **OPTIONS)

    def step() -> None:
        with use("apex", op="adam"):
            optimizer.step()

    return step


def through(name: str, step: Step) -> Step:
    def run() -> None:
        with use(name, op="adam"):
            step()

    return run


def test_adam_fp32(full: bool, results: Results) -> None:
    n, where = 50_000_000 if full else 4096, device()
    grad = torch.randn(n, device=where)

    def torch_step(**options: bool) -> Step:
        return torch.optim.AdamW([parameter(n, grad)], **OPTIONS, **options).step

    theirs = deepspeed_adam([parameter(n, grad)], full)
    own = FusedAdam([parameter(n, grad)], **OPTIONS)
    steps: dict[str, Step | str] = {
        f"phi_fast {name}": through(name, own.step) for name in backends("adam", where) if name != "apex"
    }
    steps |= {
        "torch fused": torch_step(fused=True),
        "torch foreach": torch_step(foreach=True),
        "torch.compile": torch.compile(torch_step(foreach=True)) if full else NOT_COMPILED,
        "DeepSpeed": theirs if isinstance(theirs, str) else theirs.step,
        "NVIDIA apex": apex_step([parameter(n, grad)]),
        "Liger-Kernel": absent("liger_kernel") or "has no optimizer",
    }
    cost = Cost(moved=28 * n)
    running = {name: s if isinstance(s, str) else Contender(s, cost.moved) for name, s in steps.items()}
    subject = compare(
        "adam, fp32",
        running | bounds(cost, grad, full),
        config={"parameters": n, "bytes a parameter": 28},
        repeats=11 if full else 1,
        budget=10,
    )
    results.add(subject)


def test_whole_update_of_bf16_weights(full: bool, results: Results) -> None:
    """Norm, unscale, clip, skip on overflow, Adam on the fp32 master, 16-bit weights written."""
    n, where = 50_000_000 if full else 4096, device()
    grad = torch.randn(n, device=where).bfloat16()
    cost = Cost(moved=30 * n)
    running: dict[str, Contender | str] = {}
    for name in backends("adam", where):
        if name != "apex":
            running[f"phi_fast {name}"] = Contender(through(name, own_update(grad)), cost.moved, note="two passes")
    running["torch fused, in passes"] = Contender(update_in_passes(grad, torch_fused), cost.moved)
    theirs = update_in_passes(grad, lambda params: deepspeed_adam(params, full))
    running["DeepSpeed, in passes"] = theirs if isinstance(theirs, str) else Contender(theirs, cost.moved)
    subject = compare(
        "adam, bf16, whole update",
        running | bounds(cost, grad, full),
        config={"parameters": n, "bytes a parameter": 30, "clip": CLIP},
        repeats=11 if full else 1,
        budget=10,
    )
    results.add(subject)


def own_update(grad: Tensor) -> Step:
    n, where = grad.numel(), grad.device
    master, exp_avg, exp_avg_sq = (torch.zeros(n, device=where) for _ in range(3))
    weight, count = torch.zeros_like(grad), torch.zeros((), device=where)

    def step() -> None:
        scale, found_inf, _ = unscale_and_clip(grad_norm_squared(grad), loss_scale=2.0, max_norm=CLIP)
        state = {"step": count, "grad_scale": scale, "found_inf": found_inf}
        adam_flat_(master, grad, exp_avg, exp_avg_sq, param=weight, **state, **OPTIONS)

    return step


def torch_fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **OPTIONS)


def update_in_passes(grad: Tensor, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer | str]) -> Step | str:
    """As mixed-precision trainers write it around a stock optimizer: fp32 gradient, norm, scale, step, cast."""
    master = parameter(grad.numel(), torch.zeros_like(grad, dtype=torch.float32))
    optimizer = make([master])
    if isinstance(optimizer, str):
        return optimizer
    weight = torch.zeros_like(grad)

    def step() -> None:
        assert master.grad is not None
        master.grad.copy_(grad)
        norm = torch.linalg.vector_norm(master.grad) / 2.0
        if torch.isfinite(norm):
            master.grad.mul_(1 / (2.0 * (norm / CLIP).clamp(min=1.0)))
            optimizer.step()
            weight.copy_(master.detach())

    return step

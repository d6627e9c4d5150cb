"""AdamW over 50 M parameters: the fp32 step that every library has, and the whole update that a 16-bit model needs.

The fp32 step moves 28 bytes per parameter: it reads the gradient, and reads and writes weight, m and v. The whole
update moves 30: it reads the 16-bit gradient twice (once for its norm), reads and writes master, m and v, and writes
the 16-bit weight. Peers make the whole update in several passes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Results, compare
from benchmarks.ops import Cost, bounds
from benchmarks.peers import NOT_COMPILED, absent, backends
from benchmarks.subjects import Contender
from benchmarks.timing import device
from phi_fast.kernels import FusedAdam, use
from phi_fast.kernels.adam import adam_step_, grad_norm_squared, unscale_and_clip
from phi_fast.training.distributed import deepspeed

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}
CLIP = 1.0
COMPILED = 20.0
"""If making DeepSpeed's optimizer takes longer than this many seconds, process and imports included, it was
compiled."""
BUILD_LIMIT = 240
"""Seconds after which its build is abandoned."""
Step = Callable[[], object]


def parameter(n: int, grad: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(n, device=grad.device))
    made.grad = grad
    return made


def deepspeed_adam(params: list[nn.Parameter], full: bool) -> tuple[torch.optim.Optimizer, str] | str:
    """(DeepSpeed's optimizer, a note), or why there is none. The first call compiles it, which takes a minute."""
    if not full:
        return "compiled in the full run only"
    kind = "cuda" if params[0].is_cuda else "cpu"
    begin = time.perf_counter()
    reason = build_deepspeed_adam(kind)
    if reason:
        return reason
    seconds = time.perf_counter() - begin
    deepspeed(kind)
    from deepspeed.ops import adam

    make = adam.FusedAdam if kind == "cuda" else adam.DeepSpeedCPUAdam
    return make(params, **OPTIONS), f"compiled in {seconds:.0f} s when first made" if seconds > COMPILED else ""


def build_deepspeed_adam(kind: str) -> str | None:
    """Compile it in a separate process, and return what failed, or None. The time limit matters because a killed build
    leaves a lock for which the next build would wait for ever."""
    name = "FusedAdam" if kind == "cuda" else "DeepSpeedCPUAdam"
    code = (
        f"import torch; from phi_fast.training.distributed import deepspeed; deepspeed('{kind}'); "
        f"from deepspeed.ops.adam import {name}; {name}([torch.nn.Parameter(torch.zeros(8, device='{kind}'))])"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=BUILD_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"not compiled after {BUILD_LIMIT} s: remove the lock of a killed build in ~/.cache/torch_extensions"
    if done.returncode:
        return f"does not build here: {done.stderr.strip().splitlines()[-1][:120]}"
    return None


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

    own = FusedAdam([parameter(n, grad)], **OPTIONS)
    steps: dict[str, Step | str] = {label: through(name, own.step) for label, name in backends("adam", where).items()}
    steps |= {
        "torch fused": torch_step(fused=True),
        "torch foreach": torch_step(foreach=True),
        "torch.compile": torch.compile(torch_step(foreach=True)) if full else NOT_COMPILED,
        "NVIDIA apex": absent("amp_C") or "the row through phi_fast",
        "Liger-Kernel": absent("liger_kernel") or "has no optimizer",
    }
    cost = Cost(moved=28 * n)
    running = {name: s if isinstance(s, str) else Contender(s, cost.moved) for name, s in steps.items()}
    theirs = deepspeed_adam([parameter(n, grad)], full)
    running["DeepSpeed"] = theirs if isinstance(theirs, str) else Contender(theirs[0].step, cost.moved, note=theirs[1])
    subject = compare(
        "adam, fp32",
        running | bounds(cost, grad, full),
        config={"parameters": n, "bytes per parameter": 28},
        repeats=11 if full else 1,
        budget=10,
        kernels=True,
    )
    results.add(subject)


def test_whole_update_of_bf16_weights(full: bool, results: Results) -> None:
    """The update includes norm, unscaling, clipping, the skip on overflow, Adam on the fp32 master, and the 16-bit
    weights."""
    n, where = 50_000_000 if full else 4096, device()
    grad = torch.randn(n, device=where).bfloat16()
    cost = Cost(moved=30 * n)
    running: dict[str, Contender | str] = {}
    for label, name in backends("adam", where).items():
        running[label] = Contender(through(name, own_update(grad)), cost.moved, note="two passes")
    master = parameter(n, torch.zeros_like(grad, dtype=torch.float32))
    stock = torch.optim.AdamW([master], fused=True, **OPTIONS)
    running["torch fused, in passes"] = Contender(update_in_passes(grad, master, stock), cost.moved)
    other = parameter(n, torch.zeros_like(grad, dtype=torch.float32))
    theirs = deepspeed_adam([other], full)
    running["DeepSpeed, in passes"] = (
        theirs if isinstance(theirs, str) else Contender(update_in_passes(grad, other, theirs[0]), cost.moved)
    )
    subject = compare(
        "adam, bf16, whole update",
        running | bounds(cost, grad, full),
        config={"parameters": n, "bytes per parameter": 30, "clip": CLIP},
        repeats=11 if full else 1,
        budget=10,
        kernels=True,
    )
    results.add(subject)


def own_update(grad: Tensor) -> Step:
    n, where = grad.numel(), grad.device
    master, exp_avg, exp_avg_sq = (torch.zeros(n, device=where) for _ in range(3))
    weight, count = torch.zeros_like(grad), torch.zeros((), device=where)

    def step() -> None:
        scale, found_inf, _ = unscale_and_clip(grad_norm_squared(grad), loss_scale=2.0, max_norm=CLIP)
        state = {"step": count, "grad_scale": scale, "found_inf": found_inf}
        adam_step_([weight], [grad], [exp_avg], [exp_avg_sq], [master], **state, **OPTIONS)

    return step


def update_in_passes(grad: Tensor, master: nn.Parameter, optimizer: torch.optim.Optimizer) -> Step:
    """The update as mixed-precision trainers build it around a stock optimizer: copy the gradient to fp32, norm, scale,
    step, cast."""
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

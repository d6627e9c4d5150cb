"""`python -m benchmarks.gpu.small_launches [--cpu]`: every kernel once, forward and backward, on small ragged tensors.

What compute-sanitizer watches. Each op's name is printed before it runs, "ok NAME" after it.
"""

from __future__ import annotations

import sys

import torch

from phi_fast.kernels import use
from phi_fast.verification.cases import cases
from phi_fast.verification.judge import cast


def main(arguments: list[str]) -> None:
    device = torch.device("cpu" if "--cpu" in arguments else "cuda")
    for case in cases(torch.device("cpu")):  # the small shapes, also on a GPU
        name = f"{case.op}, {case.name}"
        print(name, flush=True)
        inputs = cast(case.inputs(torch.Generator().manual_seed(0)), torch.float16, device)
        with use("auto" if device.type == "cpu" else "triton"):
            case.ours(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"ok {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

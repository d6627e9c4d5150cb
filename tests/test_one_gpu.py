"""The plugin `one_gpu`: what a machine with one GPU would refuse is refused, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WRONG = """
import pytest, torch
from phi_fast.kernels import bias_gelu, use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.ones(4, 8, device=DEVICE, requires_grad=True)  # while it is collected

def test_mixed_operands():
    x + torch.ones(8)

def test_mixed_gradient():
    torch.autograd.grad(bias_gelu(x, None), x, torch.ones(4, 8))

def test_labels_on_the_cpu():
    torch.nn.functional.cross_entropy(x, torch.zeros(4, dtype=torch.int64))

def test_compared_across():
    assert torch.equal(x.detach(), torch.ones(4, 8))

def test_a_second_gpu():
    torch.empty(4, device="cuda:1")

def test_a_second_gpu_is_made_current():
    torch.cuda.set_device(1)

def test_cpp_on_a_gpus_tensors():
    with use("cpp"):
        bias_gelu(x, None)
"""
RIGHT = """
import copy, torch
from phi_fast.kernels import bias_gelu, in_use, use

x = torch.ones(4, 8, device="cuda", requires_grad=True)

def test_where_things_are():
    assert x.device == torch.device("cuda", 0) and x.is_cuda and x.get_device() == 0
    made = (x.new_zeros(3), torch.empty_like(x), torch.ones(2, device=x.device))
    for y in (x * 2, x.T, x.double(), x[1:], *made):
        assert y.device.type == "cuda"
    for y in (x.cpu(), x.to("cpu"), torch.ones(3), x.detach().cpu() + 1):
        assert y.device.type == "cpu"
    assert in_use(x.device)["bias_gelu"] == "triton"

def test_the_memory_of_both_is_apart():
    there = x.detach().clone()
    here = there.cpu()
    here.zero_()
    assert there.all() and not here.any()
    back = here.to("cuda")
    back.fill_(1)
    assert not here.any()

def test_what_torch_allows():
    x * torch.tensor(2.0)
    x.detach()[torch.tensor([0, 1])]
    x.detach().clone().copy_(torch.zeros(4, 8))
    copy.deepcopy([x, torch.ones(3)])
    assert x.sum().item() == 32 and x.tolist()[0][0] == 1

def test_kernels_run_in_the_interpreter():
    out = bias_gelu(x, None)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.device.type == grad.device.type == "cuda"
    torch.testing.assert_close(out, torch.nn.functional.gelu(x, approximate="tanh"))

def test_a_model_moves_whole():
    model = torch.nn.Linear(8, 2).to("cuda")
    loss = model(x).sum()
    loss.backward()
    assert model.weight.device == model.weight.grad.device == x.device
"""


def run(*words: str) -> str:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "one_gpu", "-p", "no:cacheprovider", "-v", "-rA", *words]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent).stdout


def test_what_one_gpu_refuses(tmp_path: Path) -> None:
    (tmp_path / "test_wrong.py").write_text(WRONG)
    output = run(str(tmp_path / "test_wrong.py"))
    outcomes = dict(re.findall(r"::(\w+) (PASSED|FAILED|ERROR)", output))
    assert outcomes == dict.fromkeys(re.findall(r"def (test_\w+)", WRONG), "FAILED"), output[-3000:]
    assert "on the CPU, others are on cuda:0" in output
    assert "cuda:1: this machine has one GPU" in output
    assert "backend 'cpp' runs on CPU tensors, these are on cuda:0" in output


@pytest.mark.slow
def test_what_one_gpu_allows(tmp_path: Path) -> None:
    (tmp_path / "test_right.py").write_text(RIGHT)
    output = run(str(tmp_path / "test_right.py"))
    assert re.search(r"= 5 passed", output), output[-3000:]


CANNOT = "compile or opcheck or graph or sdpa or triton or checkpoint"
"""Words of tests that need a real GPU, its compiler or its streams; Triton's kernels are tested without this, too."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "linear_cross_entropy", "linear_cross_entropy_options", "layer_norm"])
def test_the_kernels_tests_fit_a_machine_with_one_gpu(name: str) -> None:
    output = run(f"tests/kernels/test_{name}.py", "-m", "not slow", "-k", f"not ({CANNOT})")
    assert re.search(r"= \d+ passed(?!.*(failed|error))", output), output[-3000:]

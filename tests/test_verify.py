"""phi_fast.verify passes on correct kernels, and reports wrong, nondeterministic, failing and missing ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phi_fast import PhiConfig
from phi_fast._C import cpu
from phi_fast.kernels import BackendUnavailable
from phi_fast.kernels.reference import bias_gelu
from phi_fast.model import Phi
from phi_fast.verification import golden
from phi_fast.verification.judge import Case, differentiate, judge
from phi_fast.verify import main

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--backends", "reference", "--dtypes", "fp32"]


def test_every_op_and_the_model_pass_on_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["--device", "cpu", "--backends", "reference", "cpp", "sdpa", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["ok"] and {v["op"] for v in report["verdicts"]} == {
        *("rotary", "layer_norm", "bias_gelu", "gated_activation", "attention", "linear_cross_entropy", "adam", "model")
    }
    assert {v["dtype"] for v in report["verdicts"]} == {"float32", "float16", "bfloat16"}
    ran = [v for v in report["verdicts"] if v["status"] == "ok"]
    assert all(0 < v["errors"][v["worst"]]["ratio"] <= 2 for v in ran)
    assert {"dhidden", "dweight", "dbias"} <= set(next(v for v in ran if v["op"] == "linear_cross_entropy")["errors"])
    assert "0 failed" in capsys.readouterr().out


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = bias_gelu.backward

    def wrong(*args, **options) -> tuple[Tensor, Tensor]:
        dx, dbias = right(*args, **options)
        dx[3, 5] += 1e-3
        return dx, dbias

    monkeypatch.setattr(bias_gelu, "backward", wrong)
    assert main([*QUICK, "--ops", "bias_gelu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "dx: error" in out and "dbias" not in out.split("FAIL bias_gelu")[1]
    assert "…" not in out  # no name is cut off when there is no terminal


def draw(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(40, 7, generator=generator)}


def verdict(ours, dtype: torch.dtype = torch.float32, factor: float = 2.0):
    case = Case("bias_gelu", "a case", draw, differentiate(ours), differentiate(lambda x: torch.exp(x)))
    (result,) = judge(case, dtype, CPU, ["reference"], factor)
    return result


def test_what_is_held_against_a_kernel() -> None:
    assert verdict(torch.exp).status == "ok"
    assert verdict(torch.exp, torch.bfloat16).status == "ok"

    flip = iter(range(10))
    unstable = verdict(lambda x: torch.exp(x) * (1 + 2.0**-23 * (next(flip) % 2)))
    assert unstable.status == "fail" and "out: two runs differ" in unstable.detail

    one_element = torch.zeros(40, 7).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(2e-6))
    spike = verdict(lambda x: torch.exp(x) + one_element)
    assert spike.status == "fail" and "out: " in spike.detail

    nan = verdict(lambda x: torch.exp(x).masked_fill(one_element > 0, torch.nan))
    assert nan.status == "fail" and "out: error nan" in nan.detail

    coarse = verdict(lambda x: torch.exp(x.half()).to(x.dtype))
    assert coarse.status == "fail" and coarse.errors["out"].ratio > 100

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of shared memory")

    assert verdict(broken).detail == "RuntimeError: out of shared memory"

    def missing(x: Tensor) -> Tensor:
        raise BackendUnavailable("no such library")

    assert (verdict(missing).status, verdict(missing).detail) == ("not run", "no such library")


def test_a_back_end_that_is_not_there_is_named_and_does_not_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["--device", "cpu", "--backends", "triton", "--dtypes", "fp32", "--ops", "attention"]) == 0
    assert "not run: triton for attention. attention: Triton needs a GPU" in capsys.readouterr().out


def test_instructions_that_the_build_lacks_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "omitted_isas", lambda: ["amx"])
    assert main([*QUICK, "--ops", "rotary"]) == 0
    assert f"C++ kernels {cpu.isa()} (built by a compiler without amx)" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_unknown_options_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--factr", "3"])


def test_a_checkpoint_that_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--ops", "rotary", "--checkpoint", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_golden_logits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model is not phi-1.5, but passes against its own logits."""
    model = Phi(PhiConfig(51200, 64, 1, 1, 64))
    monkeypatch.setattr(golden, "load", lambda name, device, dtype: (model, None))
    assert main([*QUICK, "--ops", "rotary", "--checkpoint", "microsoft/phi-1_5"]) == 1
    assert "FAIL" in capsys.readouterr().out
    own = model(torch.tensor([golden.TOKENS])).logits[0, :2, :10].tolist()
    monkeypatch.setattr(golden, "LOGITS", own)
    assert main([*QUICK, "--ops", "rotary", "--checkpoint", "microsoft/phi-1_5"]) == 0
    assert "microsoft/phi-1_5: logits within" in capsys.readouterr().out


@pytest.mark.slow
def test_triton_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs on a GPU, or in the interpreter (TRITON_INTERPRET=1, which the kernels' tests set)."""
    pytest.importorskip("triton")
    assert main(["--backends", "triton"]) == 0, capsys.readouterr().out

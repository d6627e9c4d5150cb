"""The adapters to NVIDIA's apex, which is not installed: their message for that, and their calls, tested on stand-ins.

The stand-ins have the signatures of apex's `fused_layer_norm_cuda` and `amp_C` and compute the same in plain PyTorch.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from phi_fast.kernels import BackendUnavailable, backend
from phi_fast.kernels.adam import adam_step_, grad_norm_squared
from phi_fast.kernels.reference import layer_norm as reference
from phi_fast.kernels.reference.layer_norm import ResidualStream


def test_apex_that_is_missing_is_named() -> None:
    grads = [torch.zeros(3)]
    with backend.use("apex", op="adam"), pytest.raises(BackendUnavailable, match="adam: backend 'apex' needs NVIDIA's"):
        grad_norm_squared(grads)


class LayerNormStandIn:
    def forward_affine(self, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> tuple:
        assert x.is_contiguous()
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        return out, mean.flatten(), rstd.flatten()

    def backward_affine(self, dy, mean, rstd, x, shape, weight, bias, eps, memory_efficient) -> tuple:
        assert dy.is_contiguous() and x.is_contiguous() and not memory_efficient
        statistics = (mean.unsqueeze(1), rstd.unsqueeze(1))
        return torch.ops.aten.native_layer_norm_backward(dy, x, shape, *statistics, weight, bias, [True] * 3)


def test_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", LayerNormStandIn())
    with backend.use("apex", op="layer_norm"):
        apex = backend.implementation("layer_norm", torch.device("cpu"))
    x, residual, dy, residual_grad = torch.randn(4, 7, 20).unbind()
    weight, bias, shift = torch.randn(3, 20).unbind()
    results = []
    for kernel in (reference, apex):
        buffers = {name: torch.empty(7, 20) for name in ("out", "summed", "shifted")}
        stream = ResidualStream(residual, buffers["summed"], shift, buffers["shifted"])
        out = kernel.forward(x, weight, bias, 1e-5, stream, out=buffers["out"])
        assert out[0] is buffers["out"]
        dx = torch.empty(7, 40)[:, 20:]
        grads = kernel.backward(dy, buffers["summed"], weight, *out[1:], residual_grad=residual_grad, dx=dx)
        results.append([*out, *grads, *buffers.values()])
        results[-1].extend(kernel.forward(x[:, ::1].T.contiguous().T, weight, bias, 1e-5))
        results[-1].extend(kernel.backward(dy, x, weight, *out[1:]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def adam_capturable(  # the signature and the formulas of apex's csrc/multi_tensor_adam.cu
    chunk, skip, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay, inverse_scale
) -> None:
    assert chunk > 0 and skip.dtype == step.dtype == torch.int32 and lr.dtype == torch.float32
    if skip.item() == 1:
        return
    t = step.item()
    for g, p, m, v, *master in zip(*lists, strict=True):
        source = master[0] if master else p
        assert g.dtype == p.dtype and m.dtype == v.dtype == source.dtype
        grad, weight = g.float() * inverse_scale, source.clone()
        if mode == 0:
            grad = grad + decay * weight
        m.copy_(beta1 * m + (1 - beta1) * grad)
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        corrections = (1 - beta1**t, 1 - beta2**t) if bias_correction == 1 else (1, 1)
        update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + eps)
        if mode == 1:
            update = update + decay * weight
        source.copy_(weight - lr * update)
        p.copy_(source)
        g.copy_(grad)


def l2norm(chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, Tensor]:
    assert flag.dtype == torch.int32 and not per_tensor
    return torch.stack([g.float().norm() for g in lists[0]]).norm().reshape(1), torch.empty(0)


@pytest.fixture
def amp_c(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {f"multi_tensor_adam_capturable{suffix}": adam_capturable for suffix in ("", "_master")}
    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace(**kernels, multi_tensor_l2norm=l2norm))


@pytest.mark.usefixtures("amp_c")
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("with_master", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_adam(decoupled: bool, with_master: bool, bias_correction: bool) -> None:
    results = []
    for name in ("reference", "apex"):
        torch.manual_seed(0)
        masters, grads, exp_avgs, roots = ([torch.randn(n) for n in (5, 40)] for _ in range(4))
        exp_avg_sqs = [root.square() for root in roots]
        dtype = torch.float16 if with_master else torch.float32
        params, grads = [p.to(dtype) for p in masters], [g.to(dtype) for g in grads]
        kept = [g.clone() for g in grads]
        with backend.use(name, op="adam"):
            for found_inf in (0.0, 2.0):
                adam_step_(
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    masters if with_master else None,
                    step=torch.tensor(3.0),
                    lr=1e-2,
                    betas=(0.9, 0.98),
                    weight_decay=0.1,
                    decoupled=decoupled,
                    bias_correction=bias_correction,
                    grad_scale=torch.tensor(0.25),
                    found_inf=torch.tensor(found_inf),
                )
            norm = grad_norm_squared(grads)
        assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True)), "gradients are read only"
        results.append([*masters, *exp_avgs, *exp_avg_sqs, *(params if not with_master else ()), norm])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("amp_c")
def test_adam_refuses_dtypes_that_apex_does_not_combine() -> None:
    half, single = [torch.zeros(3).half()], [torch.zeros(3)]
    for params, grads, masters in ((half, half, None), (half, single, single), (single, half, None)):
        with backend.use("apex", op="adam"), pytest.raises(ValueError, match="backend 'apex' got torch"):
            adam_step_(params, grads, [torch.zeros(3)], [torch.zeros(3)], masters, step=torch.zeros(()), lr=0.1)


def test_rms_norm_is_refused() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    with backend.use("apex", op="layer_norm"):
        apex = backend.implementation("layer_norm", torch.device("cpu"))
        with pytest.raises(backend.BackendUnavailable, match="rms_norm: backend 'apex' has only layer_norm"):
            apex.forward(x, weight, None, 1e-6)
        with pytest.raises(backend.BackendUnavailable, match="rms_norm: backend 'apex' has only layer_norm"):
            apex.backward(x, x, weight, None, torch.ones(3))

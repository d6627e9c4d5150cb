"""How many kernels a training step of phi launches in Triton: counted on meta tensors, where launches are recorded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu.kernel_cache import meta_as_a_gpu
from phi_fast import Phi, PhiConfig
from phi_fast.kernels import FusedAdam, fuse_rotary, use
from phi_fast.kernels.adam import grad_norm_squared
from phi_fast.kernels.triton.common import Launch, recording

LAYERS = 3


def names(launches: list[Launch]) -> Counter[str]:
    return Counter(launch.kernel.__name__ for launch in launches)


@pytest.mark.parametrize("inside", [False, True], ids=["RoPE before", "RoPE inside"])
def test_kernels_of_a_step(inside: bool) -> None:
    with meta_as_a_gpu(), use("triton"), fuse_rotary(inside), recording("sm_90") as found, torch.device("meta"):
        model = Phi(PhiConfig.preset("phi-1.5").replace(num_hidden_layers=LAYERS)).half()
        ids = torch.zeros(2, 2048, dtype=torch.int64)
        model(ids, ids).loss.backward()
        step = names(found)
        optimizer = FusedAdam(model.parameters(), lr=1e-4, master_weights=True)
        found.clear()
        grad_norm_squared([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        update = names(found)
    assert step == {
        "_layer_norm_forward": 2 * LAYERS + 1,  # backward forms the block's again; and the model's last
        "_layer_norm_backward": LAYERS + 1,
        **({} if inside else {"_rotate": 2 * LAYERS}),  # q and k together, and their gradients
        "forward_kernel": LAYERS,  # attention
        "dq_kernel": LAYERS,
        "dkv_kernel": LAYERS,
        "_forward": LAYERS,  # GELU
        "_backward": LAYERS,
        "_cross_entropy": 1,  # one chunk of logits, and the sums of its gradient's columns
        "_add_column_sums": 1,
    }
    assert update == {"_sum_of_squares": 1, "_adam": 1}, "all parameters at once"

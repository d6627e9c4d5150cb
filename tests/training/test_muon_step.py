"""Muon in the ZeRO-2 step: torch's trajectory on phi's own matrices, any number of ranks, overflow, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer_processes import arguments, finish, latest, losses, weights

from phi_fast import Phi, PhiConfig
from phi_fast.conversion.masters import Masters
from phi_fast.conversion.source import Source
from phi_fast.model.matrices import is_hidden_matrix
from phi_fast.model.merged import to_merged, to_split
from phi_fast.model.reference import ReferencePhi
from phi_fast.recipes import RECIPES
from phi_fast.train import INTERRUPTED
from phi_fast.training.distributed import World, join
from phi_fast.training.muon import cost, share_out
from phi_fast.training.parameters import parameter_groups
from phi_fast.training.zero import Zero2

RECIPE = RECIPES["tiny"].replace(
    model=PhiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1),
    optimizer="muon",
    loss_scale_window=3,
    initial_loss_scale=2.0**10,
)
MATRICES = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


@pytest.fixture(scope="module")
def world() -> World:
    return join("cpu")


def zero2(model: nn.Module, world: World, precision: str = "fp32", **options: object) -> Zero2:
    return Zero2(model, RECIPE, world, precision=precision, micro_batch_size=4, accumulation=1, **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def orthogonal(m: torch.Tensor) -> torch.Tensor:
    """The published quintic on the singular values in float64, 5 times."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


def published(m: torch.Tensor) -> torch.Tensor:
    """Keller Jordan's loop in m's dtype."""
    x = m / torch.linalg.vector_norm(m)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_merged_matrices_are_orthogonalised_in_their_parts(world: World) -> None:
    """Phi's q, k, v, fc1 and dense, fc2 apart, by singular values in float64, and AdamW for the rest: beside them, the
    matrices' error is at most twice that of the same in plain PyTorch's fp32."""
    torch.manual_seed(0)
    start = {name: tensor.clone() for name, tensor in ReferencePhi(RECIPE.model).state_dict().items()}
    merged = Phi(RECIPE.model)
    merged.load_state_dict(to_merged(start), strict=False)
    zero = zero2(merged, world)
    for step in range(3):
        zero.backward(zero.loss(*batch(step)))
        zero.step(2e-3)
    plain, exact = (trajectory(start, dtype) for dtype in (torch.float32, torch.float64))
    for name, tensor in to_split(dict(zero.model.named_parameters())).items():
        if not is_hidden_matrix(name, tensor.dim()):  # AdamW divides by gradients that may be rounding alone
            torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=2e-5)
            continue
        ours, theirs = (torch.linalg.vector_norm(x.double() - exact[name]) for x in (tensor, plain[name]))
        assert ours <= 2 * theirs, f"{name}: error {ours:.3e}, plain PyTorch {theirs:.3e}"


def trajectory(start: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights after three steps of plain PyTorch in `dtype`."""
    reference = ReferencePhi(RECIPE.model).to(dtype)
    reference.load_state_dict(start)
    named = dict(reference.named_parameters())
    ours = {name: p for name, p in named.items() if name.endswith(tuple(f"{part}.weight" for part in MATRICES))}
    assert len(ours) == len(MATRICES)
    momenta = {name: torch.zeros_like(p) for name, p in ours.items()}
    rest = [p for name, p in named.items() if name not in ours]
    groups = [{"params": [p for p in rest if p.dim() == d], "weight_decay": 0.1 * (d == 2)} for d in (2, 1)]
    adam = torch.optim.AdamW(groups, lr=2e-3, betas=RECIPE.betas, eps=RECIPE.eps)
    for step in range(3):
        reference.zero_grad()
        reference(*batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), RECIPE.gradient_clipping)
        adam.step()
        for name, p in ours.items():
            assert p.grad is not None
            momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
            direction = 0.05 * p.grad + 0.95 * momenta[name]
            update = orthogonal(direction) if dtype == torch.float64 else published(direction)
            with torch.no_grad():
                p.copy_(p * (1 - 2e-3 * 0.1) - 2e-3 * 0.2 * max(p.shape) ** 0.5 * update)
    return {name: p.detach() for name, p in named.items()}


def test_an_overflow_skips_that_step_and_nothing_else(world: World) -> None:
    torch.manual_seed(0)
    zero = zero2(Phi(RECIPE.model).half(), world, precision="fp16")
    for step in range(4):
        before = {name: tensor.clone() for name, tensor in zero.partitions().items()}
        loss = zero.loss(*batch(step))
        zero.backward(loss * float("inf") if step == 2 else loss)
        outcome = zero.step(1e-3)
        assert outcome.skipped == (step == 2)
        assert not outcome.broken
        for name, tensor in zero.partitions().items():
            assert torch.equal(before[name], tensor) == (step == 2), name
    assert zero.state_dict()["updates"] == 3


def test_only_hidden_matrices_are_muons_and_have_one_moment(world: World) -> None:
    model = Phi(RECIPE.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, decayed, others = parameter_groups(model, RECIPE)
    assert [names[p] for p in muon["params"]] == ["layers.0.in_proj.weight", "layers.0.out_proj.weight"]
    assert [names[p] for p in decayed["params"]] == ["embed_tokens.weight", "lm_head.weight"]
    assert all(p.dim() == 1 for p in others["params"])
    assert muon["weight_decay"] == decayed["weight_decay"] == RECIPE.weight_decay
    assert not is_hidden_matrix("model.embed_tokens.weight", 2)
    kinds = {name for name in zero2(model, world).partitions() if name.endswith(".0")}
    assert kinds == {"master.0", "momentum.0"}


def test_owners_have_nearly_equal_work() -> None:
    assert cost((3, 2)) == cost((2, 3)) == 5 * (2 * 2 * 2 * 3 + 2 * 2 * 2 * 2 + 2 * 2 * 2 * 3)
    costs = [18, 12] * 24  # phi-1.5's layers: in_proj's parts and out_proj's
    for ranks in (1, 2, 3, 8, 16):
        owners = share_out(costs, ranks)
        loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
        assert max(loads) - min(loads) <= max(costs)
    assert set(share_out([1], 4)) == {0}


def test_deepspeeds_own_step_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="optimizer='muon' needs fused=True"):
        zero2(Phi(RECIPE.model), world, fused=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_ranks_gives_equal_bits(data: Path, tmp_path: Path, precision: str) -> None:
    """Each rank's gradient is the mean, bit for bit, so that only the step can differ; three ranks cut the matrices in
    other places than two."""
    options = {"optimizer": "muon", "precision": precision, "gradient_clipping": 0.0, "global_batch_size": 6}
    runs = {ranks: tmp_path / f"run-{ranks}" for ranks in (1, 2, 3)}
    for ranks, run in runs.items():
        finish(arguments(data, run, 2, **options), tmp_path / f"{ranks}", ranks=ranks, fault="known_gradients")
    for name, tensor in weights(runs[1]).items():
        assert torch.equal(tensor, weights(runs[2])[name]), name
        assert torch.equal(tensor, weights(runs[3])[name]), name
    three = runs[3]
    masters = Masters.of(Source.open(str(latest(three))))
    assert masters is not None
    for name, tensor in weights(three).items():
        master = masters.read(name, 0, 0, tensor.shape[0])
        assert torch.equal(master.to(tensor.dtype), tensor), name


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_resuming_goes_on_as_if_never_stopped(data: Path, tmp_path: Path, before: int, after: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(arguments(data, whole, 6, optimizer="muon"), tmp_path / "w", ranks=before)
    words = arguments(data, parts, 6, optimizer="muon")
    finish([*words, "--stop-after", "3"], tmp_path / "p", ranks=before, expect=INTERRUPTED)
    finish([*words, "--resume"], tmp_path / "q", ranks=after)
    if before == after:
        assert losses(parts) == losses(whole)
        assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(parts).items())
        for rank in range(before):
            there, here = (load_file(latest(run) / f"rank-{rank}-of-{before}.safetensors") for run in (whole, parts))
            assert {"master.0", "momentum.0", "exp_avg.1"} <= there.keys()
            assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())
    else:
        assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


def test_the_optimizer_of_a_run_stays(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(arguments(data, run, 2), tmp_path / "a")
    words = arguments(data, run, 4, optimizer="muon")
    output = finish([*words, "--resume", "--allow-change"], tmp_path / "b", expect=2)
    assert "optimizer is adamw, now muon" in " ".join(output.split())

"""FusedAdam on FSDP2's DTensors beside torch.optim.AdamW, on 1 and 2 gloo ranks; tensors without memory are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

from phi_fast.kernels import FusedAdam
from phi_fast.kernels.adam import adam_step_, grad_norm_squared, unscale_and_clip

RECIPE = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}


def sharded_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Parameters with 5, 3 and 1 rows; on two ranks the shards have 3 and 2, 2 and 1, 1 and 0 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def backward(model: nn.Module, step: int) -> None:
    """Compute gradients of a batch that differs between ranks and steps."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(torch.randn(4, 8, generator=generator).to(dtype)).square().mean().backward()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        backward(model, step)
        optimizer.step()


def assert_equal_runs(ours: nn.Module, mine: FusedAdam, theirs: nn.Module, peer: torch.optim.Optimizer) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=1e-6, atol=1e-7)
        assert set(mine.state[p]) == set(peer.state[q])
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = mine.state[p][name], peer.state[q][name]
            assert type(a) is type(b) is DTensor and a.placements == b.placements == p.placements
            torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-6, atol=1e-7)
        assert (
            type(mine.state[p]["step"]) is type(peer.state[q]["step"])
            and mine.state[p]["step"] == peer.state[q]["step"]
        )


def check_trajectory(_: Path) -> None:
    ours, theirs = sharded_model(), sharded_model()
    mine, peer = FusedAdam(ours.parameters(), **RECIPE), torch.optim.AdamW(theirs.parameters(), **RECIPE)
    before = [p._version for p in ours.parameters()]
    run(ours, mine, 1, 5)
    run(theirs, peer, 1, 5)
    assert_equal_runs(ours, mine, theirs, peer)
    assert all(p._version > version for p, version in zip(ours.parameters(), before, strict=True))


def check_16_bit_with_masters(_: Path) -> None:
    """The result equals a step on the whole tensors on one rank, bit for bit."""
    model = sharded_model(torch.bfloat16)
    whole = [p.detach().full_tensor().clone().requires_grad_() for p in model.parameters()]
    mine = FusedAdam(model.parameters(), master_weights=True, **RECIPE)
    alone = FusedAdam(whole, master_weights=True, **RECIPE)
    for step in range(1, 4):
        backward(model, step)
        for p, q in zip(model.parameters(), whole, strict=True):
            q.grad = p.grad.full_tensor()
        mine.step()
        alone.step()
    for p, q in zip(model.parameters(), whole, strict=True):
        assert torch.equal(p.full_tensor(), q)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert mine.state[p][name].placements == p.placements
            assert torch.equal(mine.state[p][name].full_tensor(), alone.state[q][name])


def check_state_dicts(folder: Path) -> None:
    """2 steps each of FusedAdam, torch's AdamW and FusedAdam, with sharded, whole and saved state dicts between them,
    equal 6 steps of torch's AdamW."""
    model, theirs = sharded_model(), sharded_model()
    peer = torch.optim.AdamW(theirs.parameters(), **RECIPE)
    run(theirs, peer, 1, 6)
    saved, options = None, StateDictOptions()
    for first, kind in ((1, FusedAdam), (3, torch.optim.AdamW), (5, FusedAdam)):
        optimizer = kind(model.parameters(), **RECIPE)
        model.zero_grad()  # without gradients, torch creates the states to load into by a step of its own
        if saved is not None:
            set_optimizer_state_dict(model, optimizer, saved, options=options)
        run(model, optimizer, first, first + 1)
        options = StateDictOptions(full_state_dict=first == 3)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert_equal_runs(model, optimizer, theirs, peer)

    dcp.save(saved, checkpoint_id=folder / "optimizer")
    again = FusedAdam(model.parameters(), **RECIPE)
    model.zero_grad()
    fresh = get_optimizer_state_dict(model, again)
    dcp.load(fresh, checkpoint_id=folder / "optimizer")
    set_optimizer_state_dict(model, again, fresh)
    assert_equal_runs(model, again, theirs, peer)


def check_norm_and_clipping(_: Path) -> None:
    ours, theirs = sharded_model(), sharded_model()
    backward(ours, 1)
    backward(theirs, 1)
    grads = [p.grad for p in ours.parameters()]
    norm_squared = grad_norm_squared(grads)
    exact = sum(grad.full_tensor().double().square().sum() for grad in grads)
    assert type(norm_squared) is Tensor and abs(norm_squared - exact) <= 1e-6 * exact
    grad_scale, found_inf, norm = unscale_and_clip(norm_squared, max_norm=0.01)
    theirs_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.01).full_tensor()
    torch.testing.assert_close(norm, theirs_norm, rtol=1e-6, atol=0)
    mine, peer = FusedAdam(ours.parameters(), **RECIPE), torch.optim.AdamW(theirs.parameters(), **RECIPE)
    mine.step(grad_scale=grad_scale, found_inf=found_inf)
    peer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=1e-5, atol=1e-6)


def check_norm_of_every_placement(_: Path) -> None:
    """Shards are added up, replicas count once, partial sums are summed first, a plain tensor is its rank's own."""
    mesh, rank, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank(), dist.get_world_size()
    shard = DTensor.from_local(torch.full((3,), rank + 1.0), mesh, [Shard(0)])
    copies = DTensor.from_local(torch.full((2,), 3.0), mesh, [Replicate()])
    terms = DTensor.from_local(torch.full((2,), rank + 1.0), mesh, [Partial()])
    ranks = range(1, world + 1)
    expected = {"shard": sum(3 * r**2 for r in ranks), "copies": 18, "terms": 2 * sum(ranks) ** 2}
    for name, grad in (("shard", shard), ("copies", copies), ("terms", terms)):
        assert grad_norm_squared(grad) == expected[name], name
    assert grad_norm_squared([shard, torch.ones(7), copies, terms]) == sum(expected.values()) + 7
    shard.to_local()[0] = torch.nan if rank == world - 1 else 1.0
    assert grad_norm_squared([copies, shard]).isnan()


def check_gradient_of_another_placement(_: Path) -> None:
    """As in torch, a partial or replicated gradient is redistributed to the parameter's placement."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Replicate(), Shard(0)):
        results = []
        for kind in (FusedAdam, torch.optim.AdamW):
            p = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [placement]))
            p.grad = DTensor.from_local(torch.ones(p.shape) * (1.0 + dist.get_rank()), mesh, [Partial()])
            kind([p], **RECIPE).step()
            results.append(p.full_tensor())
        torch.testing.assert_close(*results)


def check_refusals(_: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard, copy_ = (DTensor.from_local(torch.ones(2), mesh, [placement]) for placement in (Shard(0), Replicate()))
    terms = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    scalars = {"step": torch.zeros(()), "lr": 0.1}
    with pytest.raises(ValueError, match=r"grads\[0\] is placed .*Replicate.* and params\[0\] .*Shard\(dim=0\)"):
        adam_step_([shard], [copy_], [shard], [shard], **scalars)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is placed None and params\[0\]"):
        adam_step_([shard], [shard], [torch.ones(2)], [shard], **scalars)
    with pytest.raises(ValueError, match=r"params\[0\] is a DTensor of .*: expected no Partial"):
        adam_step_([terms], [terms], [terms], [terms], **scalars)
    p = nn.Parameter(shard)
    optimizer = FusedAdam([p])
    whole = {"step": torch.ones(()), "exp_avg": torch.ones(p.shape), "exp_avg_sq": torch.ones(p.shape)}
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is .* placed None.*set_optimizer_state_dict"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: whole}})


CHECKS: tuple[Callable[[Path], None], ...] = (
    check_trajectory,
    check_16_bit_with_masters,
    check_state_dicts,
    check_norm_and_clipping,
    check_norm_of_every_placement,
    check_gradient_of_another_placement,
    check_refusals,
)


def run_checks(rank: int, world: int, folder: str, *checks: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        for check in checks:
            check(Path(folder))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_one_rank(tmp_path: Path, check: Callable[[Path], None]) -> None:
    run_checks(0, 1, str(tmp_path), check)


@pytest.mark.slow
def test_two_ranks_with_uneven_shards(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_checks, (2, str(tmp_path), *CHECKS), nprocs=2)


def without_memory() -> dict[str, Tensor]:
    with FakeTensorMode():
        fake = torch.ones(3)
    return {
        "FakeTensor": fake,
        "TwoTensor": TwoTensor(torch.ones(3), torch.ones(3)),
        "meta": torch.ones(3, device="meta"),
    }


@pytest.mark.parametrize("kind", without_memory())
def test_tensors_without_memory_are_refused(kind: str) -> None:
    """They are refused before any address is taken, in every list."""
    bad = without_memory()[kind]
    scalars = {"step": torch.zeros(()), "lr": 0.1}
    for place in range(5):
        lists = [[torch.ones(3)] for _ in range(5)]
        lists[place] = [bad]
        with pytest.raises(ValueError, match=kind):
            adam_step_(*lists, **scalars)
    with pytest.raises(ValueError, match=kind):
        adam_step_(*[[bad]] * 4, **scalars)
    for grads in ([bad], [torch.ones(3), bad]):
        with pytest.raises(ValueError, match=kind):
            grad_norm_squared(grads)
    with pytest.raises(ValueError, match=kind):
        p = nn.Parameter(bad) if kind == "meta" else bad.requires_grad_()
        p.grad = copy.deepcopy(bad).detach()
        FusedAdam([p]).step()


def test_scalars_elsewhere_are_refused() -> None:
    lists = [[torch.ones(3)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"found_inf is \(\) on meta: expected one element on cpu"):
        adam_step_(*lists, step=torch.zeros(()), lr=0.1, found_inf=torch.zeros((), device="meta"))
    with pytest.raises(ValueError, match=r"step is \(2,\) on cpu: expected one element"):
        adam_step_(*lists, step=torch.zeros(2), lr=0.1)

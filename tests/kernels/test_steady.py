"""FusedAdam reuses its last step while no tensor moved, discards it at each change, and keeps no gradient alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from numerics import backends
from torch import Tensor

from phi_fast.kernels import FusedAdam, use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Params = list[torch.nn.Parameter]


def make(count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Params, FusedAdam]:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(7, 5, generator=generator) for _ in range(count))
    params = [torch.nn.Parameter(x.to(DEVICE, dtype)) for x in draws]
    return params, FusedAdam(params, lr=1e-2, weight_decay=0.1, master_weights=True)


def fill(params: Params, seed: int) -> None:
    """Fill gradients from `seed`, in the memory of the earlier ones if there are any."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


def looks(optimizer: FusedAdam) -> list[int]:
    """A list that grows by one at each step that examines its tensors again."""
    counted: list[int] = []
    look = optimizer._look

    def spy(group):
        counted.append(1)
        return look(group)

    optimizer._look = spy  # type: ignore[method-assign]
    return counted


def test_steps_on_the_same_memory_look_once() -> None:
    params, optimizer = make()
    counted = looks(optimizer)
    for seed in range(4):
        fill(params, seed)
        optimizer.step()
    assert len(counted) == 1


def new_gradient(params: Params, optimizer: FusedAdam) -> None:
    params[1].grad = params[1].grad.clone()


def gradient_by_stride(params: Params, optimizer: FusedAdam) -> None:
    params[1].grad = params[1].grad.T.contiguous().T


def no_gradient(params: Params, optimizer: FusedAdam) -> None:
    params[1].grad = None


def moved_parameter(params: Params, optimizer: FusedAdam) -> None:
    params[1].data = params[1].data.clone()


def moved_state(params: Params, optimizer: FusedAdam) -> None:
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()


def moved_data_of_a_state(params: Params, optimizer: FusedAdam) -> None:
    state = optimizer.state[params[1]]["exp_avg_sq"]
    state.data = state.data.clone()


def loaded(params: Params, optimizer: FusedAdam) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def cleared(params: Params, optimizer: FusedAdam) -> None:
    optimizer.state.clear()


@pytest.mark.parametrize("name", backends(DEVICE))
@pytest.mark.parametrize(
    "change",
    [
        new_gradient,
        gradient_by_stride,
        no_gradient,
        moved_parameter,
        moved_state,
        moved_data_of_a_state,
        loaded,
        cleared,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_change_is_seen(change: Callable[[Params, FusedAdam], None], dtype: torch.dtype, name: str) -> None:
    """The trajectory equals that of an optimizer that remembers nothing between steps."""
    results = []
    for forgets in (True, False):
        params, optimizer = make(dtype=dtype)
        with use(name, op="adam"):
            for seed in range(6):
                if seed != 4 or change is not no_gradient:
                    fill(params, seed)
                if seed == 3:
                    change(params, optimizer)
                if forgets:
                    optimizer._steady.clear()
                optimizer.step()
        results.append([p.detach().clone() for p in params] + [s for p in params for s in optimizer.state[p].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_copy_steps_its_own_parameters(again: Callable[[FusedAdam], FusedAdam]) -> None:
    params, optimizer = make()
    fill(params, 0)
    optimizer.step()
    other = again(optimizer)
    before = [p.detach().clone() for p in params]
    theirs = other.param_groups[0]["params"]
    fill(theirs, 1)
    other.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert not any(torch.equal(p, x) for p, x in zip(theirs, before, strict=True))


def test_a_group_that_is_added_is_stepped() -> None:
    params, optimizer = make()
    fill(params, 0)
    optimizer.step()
    late = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer.add_param_group({"params": [late]})
    fill([*params, late], 1)
    optimizer.step()
    assert not torch.equal(late, torch.ones_like(late))


def test_options_are_those_of_the_step() -> None:
    params, optimizer = make()
    fill(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_no_gradient_is_kept_alive() -> None:
    params, optimizer = make()
    for seed in range(2):
        fill(params, seed)
        optimizer.step()
    watched: list[weakref.ref[Tensor]] = [weakref.ref(p.grad) for p in params]  # type: ignore[type-var]
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(grad() is not None for grad in watched)

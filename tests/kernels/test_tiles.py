"""Every Triton kernel takes its tile by one lookup, and gives the same results with any."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton

from phi_fast.kernels.reference.adam import AdamLists, AdamOptions
from phi_fast.kernels.reference.attention import AttentionOptions
from phi_fast.kernels.reference.layer_norm import ResidualStream
from phi_fast.kernels.reference.linear_cross_entropy import Objective
from phi_fast.kernels.triton import attention_tiles, launching, linear_cross_entropy_on_chip, tiles
from phi_fast.kernels.triton.common import next_power_of_2, recording
from phi_fast.kernels.triton.specimens import specimens, variants
from phi_fast.kernels.triton.tiles import RowCase, Tunable, session

TRITON = {name: importlib.import_module(f"phi_fast.kernels.triton.{name}") for name in (
    "adam", "attention", "bias_gelu", "gated_activation", "layer_norm", "linear_cross_entropy", "muon", "rotary",
)}  # fmt: skip
Run = Callable[[str], list[Tensor]]
"""Runs an op of a back end ("triton" or "reference"), and returns its results."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def module(backend: str, op: str) -> Any:
    return importlib.import_module(f"phi_fast.kernels.{backend}.{op}")


def attention(backend: str) -> list[Tensor]:
    q, k, v, dout = (normal(1, 70 + 0 * i, 2, 64) * (i + 1) / 2 for i in range(4))
    kernels, options = module(backend, "attention"), AttentionOptions(0.125)
    out, lse = kernels.forward(q, k, v, options)
    gradients = {name: torch.empty_like(q) for name in ("dq", "dk", "dv")}
    kernels.backward(dout, q, k, v, out, lse, options, **gradients)
    return [out, lse, *gradients.values()]


def layer_norm(backend: str) -> list[Tensor]:
    kernels, x, weight = module(backend, "layer_norm"), normal(37, 70), normal(70)
    out, mean, rstd = kernels.forward(
        x, weight, weight, 1e-5, ResidualStream(shift=weight, shifted=torch.empty_like(x))
    )
    return [out, mean, rstd, *kernels.backward(normal(37, 70).flip(0), x, weight, mean, rstd, residual_grad=x)]


def bias_gelu(backend: str) -> list[Tensor]:
    kernels, x, bias, dout = module(backend, "bias_gelu"), normal(37, 300), normal(300), normal(37, 300).flip(0)
    carry = normal(37, 70), torch.empty(37, 70)
    out = kernels.forward(x, bias, carry=carry)
    return [out, carry[1], *kernels.backward(dout, x, bias)]


def gated_activation(backend: str) -> list[Tensor]:
    kernels, gate, up = module(backend, "gated_activation"), normal(37, 300), normal(37, 300).flip(1)
    return [kernels.forward(gate, up), *kernels.backward(normal(37, 300).flip(0), gate, up)]


def loss(backend: str) -> list[Tensor]:
    kernels, logits, dbias = module(backend, "linear_cross_entropy"), normal(37, 300), torch.zeros(300)
    labels = torch.randint(300, (37,), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"objective": Objective(label_smoothing=0.1), "scale": torch.ones(())}
    plain = kernels.cross_entropy_(logits.clone(), labels, normal(300), need_grad=False, **given)
    losses = kernels.cross_entropy_(logits, labels, normal(300), need_grad=True, dbias=dbias, **given)
    return [plain, losses, logits, dbias]


def rotary(backend: str) -> list[Tensor]:
    kernels, x, cos, sin = module(backend, "rotary"), normal(1, 5, 5, 40), normal(8, 10), normal(8, 10).flip(0)
    kernels.rotate_(x, cos, sin, 2)
    y = x.clone()
    kernels.rotate_(x, cos, sin, 0, inverse=True)
    return [x, y]


def adam(backend: str) -> list[Tensor]:
    kernels, sizes = module(backend, "adam"), (70, 40000)
    params, grads, first, second = ([normal(n) for n in sizes] for _ in range(4))
    lists = AdamLists(params, [g.flip(0) for g in grads], first, [x.abs() for x in second])
    kernels.step_(lists, AdamOptions(torch.ones(()), 1e-3, (0.9, 0.98), 1e-7, 0.1, True))
    return [*params, *first, kernels.grad_norm_squared(grads)]


def muon(backend: str) -> list[Tensor]:
    kernels = module(backend, "muon")
    return [kernels.polynomial(normal(70, 50) / 8, -4.775, 2.0315)]  # elements of about 1


RUNS: dict[str, Run] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "bias_gelu": bias_gelu,
    "gated_activation": gated_activation,
    "linear_cross_entropy": loss,
    "rotary": rotary,
    "adam": adam,
    "muon": muon,
}


def tunables() -> dict[str, Tunable]:
    """Every kernel that the modules declare."""
    found = {}
    for kernels in (*TRITON.values(), attention_tiles, linear_cross_entropy_on_chip):
        for value in vars(kernels).values():
            for one in value.values() if isinstance(value, dict) else [value]:
                if isinstance(one, Tunable):
                    found[one.name] = one
    return found


ONE_TILE = "layer_norm.row_means"
"""The kernel without a choice, for rows of over 8192 elements."""


def test_every_kernel_of_the_specimens_declares_what_can_be_tuned() -> None:
    names = {
        specimen.name.removesuffix("_shifted").removesuffix("_carrying").removesuffix("_wide")
        for specimen in specimens("sm_90", torch.float16)
    }
    assert names - {ONE_TILE} == tunables().keys()


@pytest.mark.parametrize("architecture", attention_tiles.ARCHITECTURES)
def test_tiles_chosen_by_hand_are_among_those_tried(architecture: str) -> None:
    with session() as seen:
        specimens(architecture, torch.bfloat16)
        variants(architecture)
    assert {choice.tunable.name for choice in seen.choices} == tunables().keys()
    for choice in {(choice.tunable, choice.by_hand) for choice in seen.choices}:
        tunable, by_hand = choice
        assert tunable.parse(by_hand._asdict()) == by_hand


@pytest.mark.parametrize("op", RUNS)
def test_a_tile_reaches_the_launch_and_a_kept_launch_compares_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def spy(build: Callable[..., Any], *arguments: Any) -> None:
        given.extend(arguments)
        launching.launch(build, *arguments)

    monkeypatch.setattr(TRITON[op], "launch", spy)
    with session() as seen:
        RUNS[op]("triton")
    assert len(seen.choices) >= 2
    for choice in seen.choices:
        assert choice.by_hand in [x for x in given if isinstance(x, choice.tunable.fields)], choice.tunable.name


def test_a_description_says_which_tile_it_has() -> None:
    """The tuner finds the launch that a tile was chosen for by it."""
    with session() as seen:
        launches = [specimen.launch for specimen in specimens("sm_90", torch.float16) if specimen.name != ONE_TILE]
    assert all(launch.tile is not None for launch in launches)
    assert {launch.tile for launch in launches} == {choice.by_hand for choice in seen.choices}


def some_tiles(choice: tiles.Choice) -> list[Any]:
    """The nearest candidates, and two from anywhere."""
    found = choice.tunable.candidates(choice.by_hand)
    return [*found[1:3], *random.Random(choice.tunable.name).sample(found, min(2, len(found)))]


@pytest.mark.slow
@pytest.mark.parametrize("op", RUNS)
def test_any_tile_gives_the_results_of_plain_pytorch(op: str) -> None:
    expected = RUNS[op]("reference")
    with session() as seen:
        RUNS[op]("triton")
    choices = {(choice.tunable.name, choice.case): choice for choice in seen.choices}
    for turn in range(4):
        chosen = {key: some_tiles(choice)[turn] for key, choice in choices.items()}
        with session(chosen) as made:
            actual = RUNS[op]("triton")
        assert len(made.choices) == len(seen.choices)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5, msg=lambda text, chosen=chosen: f"{chosen}: {text}")


class Pair(NamedTuple):
    rows: int
    fast: bool


def test_candidates_begin_with_the_choice_by_hand_and_go_outwards() -> None:
    tunable = Tunable("op.pass", Pair, RowCase, {"rows": (1, 2, 4, 8), "fast": (False, True)})
    found = tunable.candidates(Pair(2, False))
    assert found[0] == Pair(2, False)
    assert {*found[1:4]} == {Pair(1, False), Pair(4, False), Pair(2, True)}
    assert found[-1] == Pair(8, True)
    assert len(found) == len({*found}) == 8
    assert tunable.candidates(Pair(16, False))[0] == Pair(16, False), "a tile of a test, or of another version"


def test_launches_of_tensors_with_memory_are_recorded_where_all_are() -> None:
    x, table = normal(1, 5, 5, 40), normal(8, 10)
    before = x.clone()
    with recording("sm_90", all=True) as launches:
        TRITON["rotary"].rotate_(x, table, table, 0)
    assert len(launches) == 1 and launches[0].arguments["x"] is x
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    with recording("sm_90") as launches:
        TRITON["rotary"].rotate_(x, table, table, 0)
    assert launches == [] and not torch.equal(x, before)


def test_powers_of_two_are_tritons() -> None:
    numbers = [*range(300), 2**20 - 1, 2**20, 2**20 + 1]
    assert [next_power_of_2(n) for n in numbers] == [triton.next_power_of_2(n) for n in numbers]

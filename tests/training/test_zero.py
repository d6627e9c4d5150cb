"""The ZeRO-2 step: torch AdamW's trajectory, the loss scale, skipped overflows, accumulation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from phi_fast import PhiConfig
from phi_fast.kernels import use
from phi_fast.model.output import Output
from phi_fast.model.reference import ReferencePhi
from phi_fast.precision import DTYPES
from phi_fast.recipes import RECIPES, Recipe
from phi_fast.training.distributed import World, join
from phi_fast.training.parameters import parameter_groups
from phi_fast.training.zero import FusedStep, Zero2, _require_internals

RECIPE = RECIPES["tiny"].replace(
    model=PhiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1),
    loss_scale_window=3,
    initial_loss_scale=2.0**10,
)


@pytest.fixture(scope="module")
def world() -> World:
    return join("cpu")


def batches(count: int, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(64, (rows, 17), generator=generator) for _ in range(count)]
    return [(row[:, :-1], row[:, 1:]) for row in ids]


def model(seed: int = 0) -> ReferencePhi:
    torch.manual_seed(seed)
    return ReferencePhi(RECIPE.model)


class Constant(nn.Module):
    """A model whose gradient is `slope` for any weights."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 4))
        self.slope = slope

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        return Output((self.weight.float() * self.slope).sum(), None)


def zero2(module: nn.Module, recipe: Recipe, world: World, **options: object) -> Zero2:
    settings = {"precision": "fp32", "micro_batch_size": 4, "accumulation": 1} | options
    return Zero2(module, recipe, world, **settings)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_trajectory_is_torch_adamws(world: World, clip: float) -> None:
    recipe = RECIPE.replace(gradient_clipping=clip)
    reference = model()
    optimizer = torch.optim.AdamW(
        parameter_groups(reference, recipe), lr=1e-3, betas=recipe.betas, eps=recipe.eps, foreach=False
    )
    zero = zero2(model(), recipe, world)
    for input_ids, labels in batches(8):
        loss = reference(input_ids, labels).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

        ours = zero.loss(input_ids, labels)
        zero.backward(ours)
        outcome = zero.step(1e-3)
        assert abs(loss.item() - ours.item()) < 1e-5
        assert outcome is not None
        assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for (name, expected), actual in zip(reference.named_parameters(), zero.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("fused", "halved"), [(True, False), (False, True)])
def test_gradients_are_divided_by_the_scale_they_were_computed_with(world: World, fused: bool, halved: bool) -> None:
    """DeepSpeed 0.19.8 halves the update of a step on which the scale doubles.

    If this fails with `halved`, DeepSpeed has fixed its step.
    """
    recipe = RECIPE.replace(gradient_clipping=0.0, betas=(0.0, 0.98))  # exp_avg is the last gradient
    zero = zero2(Constant(0.25), recipe, world, precision="fp16", fused=fused)
    zero.model.half()
    seen = []
    for input_ids, labels in batches(9):
        zero.backward(zero.loss(input_ids, labels))
        outcome = zero.step(1e-3)
        assert outcome is not None
        seen.append((zero.loss_scale / outcome.loss_scale, zero.partitions()["exp_avg.0"].unique().tolist()))
    grew = [gradients for growth, gradients in seen if growth == 2]
    others = [gradients for growth, gradients in seen if growth == 1]
    assert grew
    assert others
    assert all(gradients == [0.25] for gradients in others)
    assert all(gradients == [0.125 if halved else 0.25] for gradients in grew)


def test_a_graph_of_the_old_weights_raises_after_a_step(world: World) -> None:
    zero = zero2(model(), RECIPE, world)
    ((input_ids, labels),) = batches(1)
    old = sum(p.square().sum() for p in zero.model.parameters())
    zero.backward(zero.loss(input_ids, labels))
    zero.step(1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_overflow_skips_that_step_and_nothing_else(world: World) -> None:
    zero = zero2(model().half(), RECIPE, world, precision="fp16")
    data = batches(6)
    poisoned = {2, 4}
    for step, (input_ids, labels) in enumerate(data):
        before = {name: tensor.clone() for name, tensor in zero.partitions().items()}
        weights = copy.deepcopy(zero.model.state_dict())
        loss = zero.loss(input_ids, labels)
        zero.backward(loss * float("inf") if step in poisoned else loss)
        outcome = zero.step(1e-3)
        assert outcome is not None
        assert outcome.skipped == (step in poisoned)
        assert (outcome.grad_norm is None) == (step in poisoned)
        unchanged = all(torch.equal(before[name], tensor) for name, tensor in zero.partitions().items())
        same_weights = all(torch.equal(weights[name], tensor) for name, tensor in zero.model.state_dict().items())
        assert unchanged == same_weights == (step in poisoned)
    assert zero.state_dict()["updates"] == 4
    assert zero.loss_scale == 2.0**9  # the hysteresis of 2 tolerates the first overflow


def test_the_scales_state_survives_a_resume(world: World) -> None:
    """Scale, hysteresis and window are saved after one tolerated overflow and one step of the window."""

    def take(zero: Zero2, steps: range) -> list[tuple[float, bool]]:
        seen = []
        for step in steps:
            loss = zero.loss(*data[step])
            zero.backward(loss * float("inf") if step in (1, 4) else loss)
            outcome = zero.step(1e-3)
            assert outcome is not None
            seen.append((outcome.loss_scale, outcome.skipped))
        return seen

    data = batches(12)
    whole, parts, resumed = (zero2(model().half(), RECIPE, world, precision="fp16") for _ in range(3))
    expected = take(whole, range(12))
    assert expected[5][0] == 2.0**9 < expected[-1][0]  # the second overflow halved it, then it grew again
    first = take(parts, range(3))
    resumed.load(dict(parts.model.named_parameters()), parts.partitions(), json.loads(json.dumps(parts.state_dict())))
    assert first + take(resumed, range(3, 12)) == expected


def test_nothing_waits_for_the_device_before_the_update(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host waits wherever it reads a tensor's value, so such reads are counted, here on a CPU."""
    zero = zero2(model().half(), RECIPE.replace(skip_spikes=6.0), world, precision="fp16")
    asked: list[str] = []
    before_the_update: list[str] = []

    def count(name: str) -> None:
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor, *given: asked.append(name) or method(tensor, *given))

    update = FusedStep._update
    monkeypatch.setattr(
        FusedStep, "_update", lambda *given: (before_the_update.extend(asked), update(*given), asked.clear())
    )
    zero.backward(zero.loss(*batches(1)[0]))
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        count(name)
    zero.step(1e-3)
    assert before_the_update == []
    assert asked == ["tolist"]


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_a_run_that_goes_on_in_another_precision_keeps_no_scale(world: World, before: str, after: str) -> None:
    """The precision changes as the diagnosis of an overflow advises, and back."""
    saved, resumed = (zero2(model().to(DTYPES[name]), RECIPE, world, precision=name) for name in (before, after))
    saved.backward(saved.loss(*batches(1)[0]))
    saved.step(1e-3)
    resumed.load(dict(saved.model.named_parameters()), saved.partitions(), saved.state_dict())
    assert float(resumed.zero.loss_scale) == (RECIPE.initial_loss_scale if after == "fp16" else 1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_gradients_are_added_up_in_fp32(world: World, precision: str) -> None:
    """In fp16 and bf16, 1 + 2^-11 rounds to 1, so the second micro-batch would be lost."""
    slopes = (1.0, 2.0**-11)
    zero = zero2(
        Constant(0),
        RECIPE.replace(gradient_clipping=0.0, betas=(0.0, 0.98), initial_loss_scale=1.0),
        world,
        precision=precision,
        accumulation=2,
    )
    zero.model.to(DTYPES[precision])
    for slope in slopes:
        zero.model.slope = slope
        zero.backward(zero.loss(*batches(1)[0]))
    zero.step(1e-3)
    assert zero.partitions()["exp_avg.0"].unique().tolist() == [sum(slopes) / 2]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_rank_takes_gradients_as_autograd_made_them(world: World, precision: str) -> None:
    """Gradients pass through no bucket, average or fp32 partition, and none is left for the next step."""
    zero = zero2(model().to(DTYPES[precision]), RECIPE, world, precision=precision)
    input_ids, labels = batches(1)[0]
    loss = zero.loss(input_ids, labels)
    expected = torch.autograd.grad(loss * zero.loss_scale, list(zero.model.parameters()), retain_graph=True)
    zero.backward(loss)
    assert zero.fused is not None
    taken = [gradient for group in range(2) for _, gradient in zero.fused.gradients.of(group)]
    by_shape = sorted(zip(expected, zero.model.parameters(), strict=True), key=lambda pair: pair[1].dim() < 2)
    assert all(torch.equal(gradient, own) for gradient, (own, _) in zip(taken, by_shape, strict=True))
    assert not any(bucket.buffer for bucket in zero.zero.ipg_buckets.values())
    zero.step(1e-3)
    assert not any(bool(gradient.any()) for _, gradient in zero.fused.gradients.of(0))


def test_a_parameter_that_takes_no_part_has_no_gradient(world: World) -> None:
    class Half(Constant):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.idle = nn.Parameter(torch.ones(3, 5))

    zero = zero2(Half(), RECIPE.replace(weight_decay=0.0), world)
    zero.backward(zero.loss(*batches(1)[0]))
    zero.step(1e-3)
    assert bool((zero.model.idle == 1).all()) and bool((zero.model.weight != 0).all())


def test_accumulation_gives_the_whole_batchs_step(world: World) -> None:
    whole = zero2(model(), RECIPE, world)
    parts = zero2(model(), RECIPE, world, micro_batch_size=1, accumulation=4)
    for input_ids, labels in batches(4):
        whole.backward(whole.loss(input_ids, labels))
        expected = whole.step(1e-3)
        for row in range(4):
            if row:
                with pytest.raises(RuntimeError, match=f"step after {row} backward passes; expected 4"):
                    parts.step(1e-3)
            parts.backward(parts.loss(input_ids[row : row + 1], labels[row : row + 1]))
        actual = parts.step(1e-3)
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, tensor in whole.partitions().items():
        torch.testing.assert_close(parts.partitions()[name], tensor, rtol=0, atol=2e-5)


def test_another_deepspeed_is_refused_by_name(world: World) -> None:
    with pytest.raises(RuntimeError, match=r"has no bit16_groups, .*deepspeed>=0\.19\.8,<0\.20.*--zero-step deepspeed"):
        _require_internals(object(), world)


def test_the_host_waits_for_the_device_once_per_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes a tensor's value to the host waits until the device has computed it."""
    waits: list[str] = []
    with use("reference"):  # the C++ kernels take scalars by value, which waits for nothing on a CPU
        zero = zero2(model().half(), RECIPE, world, precision="fp16", accumulation=2)
        data = batches(4)
        for counted in (False, True):
            if counted:
                for name in ("tolist", "item", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy"):
                    monkeypatch.setattr(Tensor, name, counting(waits, name))
            for input_ids, labels in (data.pop(), data.pop()):
                zero.backward(zero.loss(input_ids, labels))
            zero.step(1e-3)
        monkeypatch.undo()
    assert waits == ["tolist"]


def counting(waits: list[str], name: str) -> Callable[..., object]:
    """Tensor's method of that name, which also notes each call."""
    method = getattr(Tensor, name)

    def call(self: Tensor, *arguments: object, **options: object) -> object:
        waits.append(name)
        return method(self, *arguments, **options)

    return call

"""Loss spikes are detected from the losses so far, and only their steps are skipped."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from trainer_processes import arguments, finish, losses, optimizer_state, weights

from phi_fast.recipes import RECIPES
from phi_fast.train import INTERRUPTED
from phi_fast.training.spikes import WARMUP, SpikeFilter, SpikeFilters

CPU = torch.device("cpu")


def judged(filter: SpikeFilter, values: list[float]) -> list[int]:
    """Return the indices of the values that are spikes."""
    return [i for i, value in enumerate(values) if filter.judge(torch.tensor(value)) > 0]


def noise(count: int, seed: int = 0) -> list[float]:
    return (3 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_mean_and_variance_are_those_of_the_first_losses() -> None:
    filter, values = SpikeFilter(6, CPU), noise(50)
    judged(filter, values)
    count, mean, variance = filter.state.tolist()
    assert count == 50
    assert mean == pytest.approx(statistics.mean(values), rel=1e-6)
    assert variance == pytest.approx(statistics.pvariance(values), rel=1e-6)


def test_only_what_rises_far_above_is_a_spike() -> None:
    values = noise(300)
    values[100] = 5.0
    values[101] = 5.0
    values[150] = 1.0
    values[200] = 3.3
    assert judged(SpikeFilter(6, CPU), values) == [100, 101]


def test_no_loss_is_a_spike_before_the_warmup() -> None:
    assert judged(SpikeFilter(6, CPU), [*noise(WARMUP - 1), 50.0]) == []
    assert judged(SpikeFilter(6, CPU), [*noise(WARMUP), 50.0]) == [WARMUP]


def test_a_loss_that_stays_high_is_let_through() -> None:
    spikes = judged(SpikeFilter(6, CPU), noise(100) + [6.0] * 60)
    assert spikes[0] == 100
    assert 3 <= len(spikes) < 20
    assert spikes == list(range(100, 100 + len(spikes)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_neither_a_spike_nor_taken_in(value: float) -> None:
    filter = SpikeFilter(6, CPU)
    judged(filter, noise(40))
    before = filter.state.clone()
    assert judged(filter, [value]) == []
    assert torch.equal(filter.state, before)


def test_the_state_survives_json() -> None:
    filter, again = SpikeFilter(6, CPU), SpikeFilter(6, CPU)
    judged(filter, noise(40))
    again.load_state_dict(json.loads(json.dumps(filter.state_dict())))
    assert torch.equal(filter.state, again.state)


def skipped(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] is not None for line in lines)
    return [line["step"] for line in lines if line["skipped"]]


def test_a_spike_is_left_out_of_the_run(data: Path, tmp_path: Path) -> None:
    """The losses of steps 40 and 41 are multiplied; the run goes on as without these steps, also after a resume."""
    words = {
        name: arguments(data, tmp_path / name, 50, skip_spikes=8, learning_rate=1e-4) for name in ("whole", "parts")
    }
    fault = {"fault": "multiply_loss_at_steps", "given": [40, 41]}
    output = finish(words["whole"], tmp_path / "output", **fault)
    assert skipped(tmp_path / "whole") == [40, 41]
    assert losses(tmp_path / "whole")[39] > 15
    assert "spike, skipped" in output
    after = losses(tmp_path / "whole")[41:]
    assert max(after) < 7

    finish([*words["parts"], "--stop-after", "30"], tmp_path / "output", expect=INTERRUPTED)
    finish([*words["parts"], "--resume"], tmp_path / "output", fault=fault["fault"], given=[10, 11])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for states in (weights, optimizer_state):
        expected, actual = states(tmp_path / "whole"), states(tmp_path / "parts")
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_two_ranks_agree_on_a_spike_of_one(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 45, skip_spikes=8, learning_rate=1e-4)
    finish(words, tmp_path / "output", ranks=2, fault="multiply_loss_at_steps", given=[40, 41])
    assert skipped(tmp_path / "run") == [40, 41]


def test_the_loss_and_the_norm_have_filters_of_their_own() -> None:
    """A step is a spike if either is; each filter learns from every step."""
    recipe = RECIPES["tiny"]
    assert not SpikeFilters.of(recipe, CPU)
    filters = SpikeFilters.of(recipe.replace(skip_spikes=6.0, skip_norm_spikes=8.0), CPU)
    loss, norm, found = noise(60), noise(60, seed=1), []
    loss[40], norm[45], loss[50], norm[50] = 9.0, 9.0, 9.0, 9.0
    for pair in zip(loss, norm, strict=True):
        found.append(float(filters.judge(loss=torch.tensor(pair[0]), norm=torch.tensor(pair[1]))))
    assert [i for i, spike in enumerate(found) if spike] == [40, 45, 50]
    assert set(found) == {0.0, 1.0}
    alone = SpikeFilter(8, CPU)
    judged(alone, norm)
    assert filters.state_dict()["norm_spikes"] == alone.state_dict()
    assert set(filters.state_dict()) == {"spikes", "norm_spikes"}
    again = SpikeFilters.of(recipe.replace(skip_norm_spikes=8.0), CPU)
    again.load_state_dict(json.loads(json.dumps({**filters.state_dict(), "updates": 3})))
    assert again.state_dict() == {"norm_spikes": alone.state_dict()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_spike_of_the_gradient_norm_is_left_out_of_the_run(data: Path, tmp_path: Path, ranks: int) -> None:
    """The gradients of steps 40 and 41 are multiplied, on one rank; the run goes on as without them, also resumed."""
    words = {
        name: arguments(data, tmp_path / name, 45, skip_norm_spikes=9, learning_rate=1e-4)
        for name in ("whole", "parts")
    }
    fault = {"fault": "multiply_gradients_at_steps", "given": [40, 41]}
    output = finish(words["whole"], tmp_path / "output", ranks=ranks, **fault)
    assert skipped(tmp_path / "whole") == [40, 41]
    assert max(losses(tmp_path / "whole")) < 7
    assert "spike, skipped" in output
    finish([*words["parts"], "--stop-after", "30"], tmp_path / "output", ranks=ranks, expect=INTERRUPTED)
    resumed = [*words["parts"], "--resume"]
    finish(resumed, tmp_path / "output", ranks=ranks, fault=fault["fault"], given=[10, 11])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(*(weights(tmp_path / name)["lm_head.weight"] for name in ("parts", "whole")))

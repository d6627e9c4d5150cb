"""Recipes and the command line: the paper's numbers, overrides, and invalid options."""

from __future__ import annotations

import itertools
import math

import pytest

from phi_fast.errors import UsageError
from phi_fast.recipes import RECIPES
from phi_fast.train import main
from phi_fast.training.options import parse, plan_batch


@pytest.mark.parametrize("name", ["phi-1.5", "phi-1.5-web", "phi-1.5-web-only"])
def test_the_papers_hyperparameters(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.model.num_parameters() == 1_418_270_720
    assert (recipe.learning_rate, recipe.schedule, recipe.warmup_steps) == (2e-4, "constant", 0)
    assert (recipe.weight_decay, recipe.betas, recipe.eps) == (0.1, (0.9, 0.98), 1e-7)
    assert (recipe.global_batch_size, recipe.sequence_length) == (2048, 2048)
    assert recipe.tokenizer == "phi-1.5"


def test_the_papers_mixtures_and_tokens() -> None:
    assert RECIPES["phi-1.5"].mixture == {"synthetic": 80, "phi-1": 20}
    assert RECIPES["phi-1.5-web"].mixture == {"web": 40, "code": 20, "synthetic": 40}
    assert RECIPES["phi-1.5-web-only"].mixture == {"web": 80, "code": 20}
    assert RECIPES["phi-1.5"].steps == 35_763
    assert RECIPES["phi-1.5-web"].tokens == 300_000_000_000
    with pytest.raises(UsageError, match="the report does not state it"):
        RECIPES["phi-1.5-web-only"].check()


def test_every_field_can_be_overridden() -> None:
    options = parse(
        ["--recipe", "phi-1.5", "--learning-rate", "3e-4", "--mixture", "a=3,b=1", "--model.num-hidden-layers", "2"]
    )
    assert options.learning_rate == 3e-4
    assert options.mixture == {"a": 3, "b": 1}
    assert options.model.num_hidden_layers == 2
    assert options.model.hidden_size == 2048
    assert options.recipe == "phi-1.5"
    assert parse([]).recipe == "tiny"


def test_the_deepspeed_launchers_local_rank_is_accepted() -> None:
    assert parse(["--local_rank=3"]) == parse([])


@pytest.mark.parametrize(
    "arguments",
    [["--lr", "1"], ["--recipe", "phi-2"], ["--tokens", "many"], ["--mixture", "docs"], ["--mixture", "a=1,a=2"]],
)
def test_what_is_not_understood_exits_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    assert exit_.value.code == 2
    assert arguments[1] in capsys.readouterr().err.replace("\n", " ") or arguments[0] == "--lr"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 257}, r"sequence_length=257 is longer than the model's context of 256 tokens"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: must be greater than 0"),
        ({"skip_spikes": 0.0}, r"skip_spikes=0\.0: must be greater than 0"),
        ({"skip_norm_spikes": -1.0}, r"skip_norm_spikes=-1\.0: must be greater than 0"),
        ({"muon_momentum": 1.0}, r"muon_momentum=1\.0: must be in \[0, 1\)"),
        ({"muon_momentum": -0.1}, r"muon_momentum=-0\.1: must be in \[0, 1\)"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0: must be greater than 0, and less than 1"),
        ({"ema_decay": 0.0}, r"ema_decay=0\.0: must be greater than 0"),
        ({"z_loss": -1e-4}, r"z_loss=-0\.0001: must not be negative"),
        ({"z_loss": math.nan}, r"z_loss=nan: must not be negative, and finite"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
        ({"learning_rate": math.inf}, r"learning_rate=inf: must be greater than 0, and finite"),
        ({"mixture": {"docs": 0}}, r"mixture=\{'docs': 0\}"),
        ({"mixture": {"docs": 0, "code": 1}}, r"mixture=\{'docs': 0, 'code': 1\}: docs has weight 0 throughout"),
        ({"mixture_stages": ((0, {"docs": 1}),)}, r"mixture_stages start at steps \[0\]: each must be above"),
        ({"mixture_stages": ((5, {"docs": 1}), (5, {"code": 1}))}, r"mixture_stages start at steps \[5, 5\]"),
        ({"mixture_stages": ((5, {"web": 1}),)}, r"from step 5 on, \{'web': 1\}: --mixture does not name web"),
        ({"mixture_stages": ((5, {"docs": 0}),)}, r"from step 5 on, \{'docs': 0\}: give at least one corpus"),
        ({"mixture": {"docs": 3_000_000_000, "code": 1}}, r"mixture=.*add up to more than 2\^20; round them"),
        ({"loss_scale_window": 0}, r"loss_scale_window=0: must be at least 1"),
        ({"loss_scale_hysteresis": 0}, r"loss_scale_hysteresis=0: must be at least 1"),
        ({"min_loss_scale": 0.0}, r"min_loss_scale=0\.0: must be greater than 0"),
        ({"min_loss_scale": 2.0**17}, r"min_loss_scale=131072\.0: .* at most initial_loss_scale=65536\.0"),
        ({"seed": -1}, r"seed=-1: must not be negative"),
        ({"seed": 2**63}, r"seed=9223372036854775808: .*fit in 63 bits"),
        ({"initial_loss_scale": 1000.0}, r"initial_loss_scale=1000\.0: must be a power of two"),
        ({"tokens": -5}, r"tokens=-5: must be at least 1"),
    ],
)
def test_recipes_that_cannot_be_trained(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RECIPES["tiny"].replace(**changes).check()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("rank-timeout", "nan"), ("rank-timeout", "inf"), ("val-rows", "0"), ("log-every", "0"), ("stop-after", "0")),
        *(("val-every", "-1"), ("save-every", "-1"), ("sample-tokens", "-5")),
    ],
)
def test_options_that_cannot_be_carried_out_are_refused_before_the_ranks_meet(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phi_fast.train.join", lambda *_: pytest.fail("the ranks met"))
    assert main([f"--{option}", value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option.replace('-', '_')}={value}")


@pytest.mark.parametrize(
    ("arguments", "ranks", "expected"),
    [
        ([], 1, (8, 1)),
        ([], 2, (4, 1)),
        (["--global-batch-size", "24"], 1, (8, 3)),
        (["--micro-batch-size", "2"], 2, (2, 2)),
        (["--gradient-accumulation-steps", "4"], 2, (1, 4)),
        (["--global-batch-size", "14"], 1, (7, 2)),
    ],
)
def test_plan_batch(arguments: list[str], ranks: int, expected: tuple[int, int]) -> None:
    assert plan_batch(parse(arguments), ranks) == expected


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        (
            ["--micro-batch-size", "3"],
            1,
            r"micro_batch_size=3 × ranks=1 × gradient_accumulation_steps=2 = 6 rows, but ",
        ),
        (["--micro-batch-size", "8"], 2, r"= 16 rows, but global_batch_size=8"),
        ([], 3, r"global_batch_size=8 rows cannot be shared out over 3 ranks; use --global-batch-size 9"),
        (["--gradient-accumulation-steps", "0"], 1, r"gradient_accumulation_steps=0: must be at least 1"),
    ],
)
def test_batches_that_do_not_multiply_out(arguments: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_batch(parse(arguments), ranks)


def test_schedules() -> None:
    recipe = RECIPES["tiny"].replace(warmup_steps=4, schedule="cosine", final_learning_rate=1e-4, tokens=100 * 2048)
    rates = [recipe.learning_rate_at(step) for step in range(recipe.steps + 1)]
    assert rates[0] == pytest.approx(recipe.learning_rate / 4)
    assert rates[3] == rates[4] == recipe.learning_rate
    assert rates[-1] == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert {RECIPES["phi-1.5"].learning_rate_at(step) for step in (0, 1, 35_762)} == {2e-4}

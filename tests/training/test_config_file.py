"""Configuration files: each option by its name, the command line over the file, and errors that name file and key."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from model_folders import make_source, random_weights
from trainer_processes import arguments, finish, losses

from phi_fast import plan
from phi_fast.config import PhiConfig
from phi_fast.recipes import RECIPES
from phi_fast.train import main
from phi_fast.training.config_file import OF_ONE_START, as_toml, overlay, read_config
from phi_fast.training.config_file import plain as to_json
from phi_fast.training.options import Options, parse
from phi_fast.training.resuming import parse_command

OTHER: dict[str, Any] = {
    "corpora": ("web=s3://bucket/web",),
    "recipe": "phi-1.5",
    "mixture": {"docs": 1, "code": 2},
    "mixture_stages": ((5, {"docs": 1}), (7, {"code": 1, "docs": 3})),
    "betas": (0.8, 0.9),
    "schedule": "cosine",
    "optimizer": "muon",
    "lora_targets": ("q_proj", "fc2"),
    "decay": "all",
    "precision": "bf16",
    "device": "cpu",
    "implementation": "reference",
    "recompute": "all",
    "zero_step": "deepspeed",
    "reduce_gradients": "step",
    "eval_tasks": ("piqa", "boolq"),
    "track": ("wandb", "mlflow"),
    "initial_loss_scale": 1024.0,
    "sample_prompt": 'tab\t "quoted" \\ é 猫',
    "tokens": 10**12,
}
"""Another value than tiny's, where it cannot be made from the value itself."""


def another(name: str, value: Any) -> Any:
    """Return a valid value of the same kind that is not `value`."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, PhiConfig):
        return value.replace(num_hidden_layers=3, layer_norm_eps=1e-6, eos_token_id=7)
    if value is None:
        hint = str(next(field.type for field in fields(Options) if field.name == name))
        return Path("some/where") if "Path" in hint else 3.0 if "float" in hint else "x" if "str" in hint else 3
    return value + 1 if isinstance(value, int | float) else Path("x") if isinstance(value, Path) else f"{value}x"


def in_file(options: Options) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in ("config", "print_config")}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command that should be refused begins to train."""
    monkeypatch.setattr("phi_fast.train.join", lambda *_: pytest.fail("the ranks met"))


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_printed_gives_the_same_options_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--recipe",
        name,
        "--tokens",
        "1e9",
        "--mixture-stages",
        "9:" + ",".join(f"{m}=1" for m in RECIPES[name].mixture),
        *(["--init-from", str(make_source(tmp_path / "hf", "hf", random_weights()))] if name == "sft" else []),
    ]
    assert main([*words, "--print-config"]) == 0
    path = tmp_path / "run.toml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert in_file(parse_command(["--config", str(path)])) == in_file(parse_command(words))


@pytest.mark.parametrize(
    "field", [field.name for field in fields(Options) if field.name not in ("config", "print_config")]
)
def test_every_option_can_be_set_by_its_name(field: str, tmp_path: Path) -> None:
    """Each alone in a file, with a value that is not the recipe's; written by `as_toml` and read as TOML."""
    usual = Options()
    changed = replace(usual, **{field: another(field, getattr(usual, field))})
    assert changed != usual
    path = tmp_path / "one.toml"
    path.write_text(as_toml(changed), encoding="utf-8")
    assert overlay(usual, read_config(path, Options), "") == changed
    assert tomllib.loads(as_toml(changed)).keys() == in_file(usual).keys()


def test_the_command_line_overrides_the_file_and_the_file_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'recipe = "phi-1.5"\nlearning-rate = 3\nwarmup_steps = 7\ntokens = 1e9\nskip_spikes = 4\n'
        'micro_batch_size = "None"\n'
        "mixture_stages = [[10, {web = 0, code = 1}]]\n[model]\nnum_hidden_layers = 2\n[mixture]\nweb = 1\ncode = 1\n"
    )
    words = [
        "--config",
        str(path),
        "--warmup-steps",
        "8",
        "--model.num-attention-heads",
        "8",
        "--model.hidden-size=512",
    ]
    options = parse(words)
    assert (options.learning_rate, options.warmup_steps, options.tokens, options.skip_spikes) == (3.0, 8, 10**9, 4.0)
    assert options.recipe == "phi-1.5"
    assert options.model == RECIPES["phi-1.5"].model.replace(
        num_hidden_layers=2, num_attention_heads=8, hidden_size=512
    )
    assert options.mixture == {"web": 1, "code": 1}
    assert options.mixture_stages == ((10, {"web": 0, "code": 1}),)
    assert options.global_batch_size == 2048
    assert parse([*words, "--recipe", "tiny"]).global_batch_size == 8
    path.write_text('recipe = "phi-1.5"\ntokens = "None"\n')
    assert parse(["--config", str(path)]).tokens is None


def test_the_last_recipe_given_decides() -> None:
    assert parse(["--recipe", "tiny", "--recipe=phi-1.5"]).global_batch_size == 2048


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte = 1", "learning_rte is not an option of phi_fast.train; did you mean learning_rate?"),
        (
            "[model]\nhiden_size = 64",
            "model.hiden_size is not an option of phi_fast.train; did you mean model.hidden_size?",
        ),
        ("xyzzy = 1", "xyzzy is not an option of phi_fast.train; it has model, "),
        ('config = "other.toml"', "config is not an option"),
        ("learning_rate = 'fast'", "learning_rate is 'fast', expected a valid number"),
        ("learning_rate = true", "learning_rate is True, expected a valid number"),
        ("learning_rate = 2020-01-01", "learning_rate is {'date': '2020-01-01'}, expected a valid number"),
        ("warmup_steps = 1.5", "warmup_steps is 1.5, expected a valid integer"),
        ("warmup_steps = '3'", "warmup_steps is '3', expected a valid integer"),
        ("tokens = 1.5", "tokens is 1.5, expected '1.5' is not a whole number, as 1000000 or 1e6"),
        ("tokens = true", "tokens is True, expected 'True' is not a whole number"),
        ("resume = 1", "resume is 1, expected a valid boolean"),
        ("schedule = 'steep'", "schedule is 'steep', expected 'constant', 'linear'"),
        (
            "recipe = 'phi-2'",
            "recipe is 'phi-2', expected 'tiny', 'phi-1.5', 'phi-1.5-web', 'phi-1.5-web-only', "
            "'phi-1.5-open', 'phi-1.5-web-open' or 'sft'",
        ),
        ("data = 3", "data is 3, expected a valid string"),
        ("betas = [0.9]", "betas is [0.9], expected an entry more, betas.1"),
        ("betas = [0.9, 'x']", "betas.1 is 'x', expected a valid number"),
        ("eval_tasks = 'piqa'", "eval_tasks is 'piqa', expected a valid array"),
        ("mixture = {docs = 1.5}", "mixture.docs is 1.5, expected a valid integer"),
        ("mixture = 'docs=1'", "mixture is 'docs=1', expected a"),
        ("mixture_stages = [[5, {docs = 'x'}]]", "mixture_stages.0.1.docs is 'x', expected a valid integer"),
        ("model = 'phi-1.5'", "model is 'phi-1.5', expected a table of its fields"),
        ("[model]\nhidden_size = 65", "model.hidden_size=65 is not num_attention_heads=4 × head dim 64"),
        ("warmup_steps = 1\nwarmup-steps = 2", "warmup_steps is set twice"),
        ('run_dir = "a\\u0000"', r"run_dir 'a\x00': no file's name can contain NUL"),
        ("tokens = = 3", "is not TOML: Invalid value (at line 1, column 10)"),
        ("a = \xff", "is not TOML"),
    ],
)
def test_a_wrong_file_names_itself_key_value_and_what_was_expected(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8"))
    assert main(["--config", str(path)]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: {path}") or "NUL" in message
    assert message in output
    assert "NUL" in message or plan.main(["--config", str(path)]) == 2
    assert "NUL" in message or message in capsys.readouterr().err


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", ["absent.toml", "absent/run.json"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / name)]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: --config {tmp_path}")
    assert "name a TOML file or a run" in output


def test_a_runs_own_config_is_given_back(data: Path, tmp_path: Path) -> None:
    """By its folder or its file; the run directory and --resume belong to one start, and are not taken over."""
    finish(arguments(data, tmp_path / "a", 3, learning_rate=0.01, stop_after=2), tmp_path, expect=75)
    finish(["--run-dir", str(tmp_path / "a"), "--resume"], tmp_path)
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["resume"] is True
    assert set(OF_ONE_START) <= saved.keys()
    for name, config in (("b", tmp_path / "a"), ("c", tmp_path / "a" / "config.json")):
        finish(["--config", str(config), "--run-dir", str(tmp_path / name)], tmp_path)
        assert losses(tmp_path / name) == losses(tmp_path / "a")
    finish(["--config", str(tmp_path / "a"), "--run-dir", str(tmp_path / "d"), "--seed", "5"], tmp_path)
    assert losses(tmp_path / "d") != losses(tmp_path / "a")


def test_a_file_may_resume_a_run_and_change_what_a_resume_may(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4)
    finish([*words, "--stop-after", "2"], tmp_path, expect=75)
    path = tmp_path / "go on.toml"
    path.write_text(f'resume = true\nrun_dir = "{tmp_path / "run"}"\nlearning_rate = 0.5\n')
    output = finish(["--config", str(path)], tmp_path)
    assert "learning_rate was 0.0015, is now 0.5" in output
    path.write_text(path.read_text() + "seed = 3\n")
    output = finish(["--config", str(path)], tmp_path, expect=2)
    assert "seed is 1337, now 3" in output


def test_plan_takes_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'recipe = "phi-1.5"\nrecompute = "all"\nmicro_batch_size = 4\nglobal_batch_size = 64\n'
        "model.num_hidden_layers = 2\n"
    )
    job = plan.run(plan.parse(["--config", str(path), "--gpus", "2"])).job
    expected = RECIPES["phi-1.5"].model.replace(num_hidden_layers=2)
    assert (job.recipe.model, job.recipe.global_batch_size) == (expected, 64)
    assert (job.recompute, job.micro_batch_size) == ("all", 4)
    plain = plan.run(plan.parse(["--config", str(path)])).plans["all"]
    path.write_text(f"ema_decay = 0.999\n{path.read_text()}")
    kept = plan.run(plan.parse(["--config", str(path)])).plans["all"]  # 4 bytes per parameter over 8 GPUs
    assert kept.memory.optimizer - plain.memory.optimizer == 4 * -(-expected.num_parameters() // 8)
    assert kept.checkpoint_bytes - plain.checkpoint_bytes == 4 * expected.num_parameters()
    words = ["--config", str(path), "--recompute", "none", "--global-batch-size", "32", "--recipe", "phi-1.5-web"]
    job = plan.run(plan.parse(words)).job
    assert (job.recompute, job.recipe.global_batch_size, job.recipe.tokens) == ("none", 32, 300_000_000_000)


def test_a_json_config_is_the_same_as_a_run(tmp_path: Path) -> None:
    options = parse(["--recipe", "phi-1.5", "--skip-spikes", "3", "--eval-data", "q", "--run-dir", "r"])
    (tmp_path / "config.json").write_text(json.dumps(to_json(asdict(options))))
    back = parse(["--config", str(tmp_path)])
    assert in_file(back) == in_file(replace(options, run_dir=None))


def test_a_file_may_name_the_weights_to_start_from(data: Path, tmp_path: Path) -> None:
    """Its init_from sets the shape, as --init-from does; with `resume` in the file they are not needed any more."""
    finish([*arguments(data, tmp_path / "a", 1), "--model.num-hidden-layers", "2"], tmp_path)
    words = arguments(data, tmp_path / "b", 2, val_every=1, stop_after=1)
    at = next(i for i, word in enumerate(words) if word.startswith("--model."))
    while words[at].startswith("--model."):
        del words[at : at + 2]
    path = tmp_path / "b.toml"
    path.write_text(f'init_from = "{tmp_path / "a"}"\n')
    output = finish([*words, "--config", str(path)], tmp_path, expect=75)
    assert f"from {tmp_path / 'a'}" in output
    (tmp_path / "a").rename(tmp_path / "away")
    path.write_text(path.read_text() + f'resume = true\nrun_dir = "{tmp_path / "b"}"\n')
    finish(["--config", str(path)], tmp_path)
    assert len(losses(tmp_path / "b")) == 2

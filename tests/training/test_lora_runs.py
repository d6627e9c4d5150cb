"""--lora-rank: adapters beside frozen weights, trained under ZeRO-2, saved for PEFT, and merged."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from model_folders import CONFIG, make_source, random_weights
from safetensors.torch import load_file, save_file
from trainer_processes import arguments, finish, latest, losses

from phi_fast import evaluate, generate, plan
from phi_fast.config import LORA_TARGETS
from phi_fast.conversion.errors import ConversionError
from phi_fast.conversion.load import load
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model import Phi
from phi_fast.model.lora import add_lora
from phi_fast.precision import DTYPES
from phi_fast.recipes import RECIPES
from phi_fast.train import INTERRUPTED, main
from phi_fast.training.distributed import join
from phi_fast.training.zero import Zero2

RANK = 4
ADAPTER = "adapter_model.safetensors"


def base_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that are large enough for adapters to move the logits, and LayerNorms that pass a signal on."""
    given = random_weights(seed=seed)
    return {name: tensor.fill_(1) if "layernorm.weight" in name else 5 * tensor for name, tensor in given.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("base") / "model", "hf", base_weights())


def words(data: Path, run: Path, base: Path, steps: int, **changes: object) -> list[str]:
    """Make the command line of a run of adapters on `base`."""
    more = {"init_from": base, "lora_rank": RANK, "learning_rate": 0.01, **changes}
    given = arguments(data, run, steps, **{name: value for name, value in more.items() if value is not None})
    pairs = list(zip(given[::2], given[1::2], strict=True))
    return [word for pair in pairs if not pair[0].startswith(("--model.", "--tokenizer")) for word in pair]


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run) / ADAPTER)


@pytest.fixture(scope="module")
def trained(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    before = {path: path.read_bytes() for path in base.iterdir()}
    finish(words(data, folder / "run", base, 12, val_every=12, val_rows=8), folder)
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    return folder / "run"


def test_the_loss_falls_and_only_adapters_are_saved(trained: Path):
    found = losses(trained)
    assert found[-1] < found[0] - 0.5
    checkpoint = latest(trained)
    assert sorted(path.name for path in checkpoint.glob("*.safetensors")) == [ADAPTER, "rank-0-of-1.safetensors"]
    d, layers = CONFIG.hidden_size, CONFIG.num_hidden_layers
    size = layers * RANK * (4 * 2 * d + 2 * 5 * d)
    assert sum(tensor.numel() for tensor in adapters(trained).values()) == size
    state = load_file(checkpoint / "rank-0-of-1.safetensors")
    assert {name: len(tensor) for name, tensor in state.items()} == {
        "master.0": size,
        "exp_avg.0": size,
        "exp_avg_sq.0": size,
    }


def wide_matrices() -> int:
    """Count the fp32 tensors with at least as many elements as a merged weight. `isinstance` would ask each object for
    its `__class__`, and lazy ones would import what they stand for."""
    gc.collect()
    least = 5 * CONFIG.hidden_size**2
    return sum(
        issubclass(type(x), torch.Tensor) and x.dtype == torch.float32 and x.numel() >= least for x in gc.get_objects()
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_weights_stay_and_have_no_fp32_copy(precision: str, fused: bool):
    before = wide_matrices()
    recipe = RECIPES["tiny"].replace(model=CONFIG, init_from="x", lora_rank=RANK, learning_rate=0.01)
    torch.manual_seed(0)
    model = Phi(CONFIG).to(DTYPES[precision])
    add_lora(model, recipe.lora)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings = {"precision": precision, "micro_batch_size": 2, "accumulation": 2, "fused": fused}
    zero = Zero2(model, recipe, join("cpu"), **settings)
    ids = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for _ in range(2):
            zero.backward(zero.loss(ids[:, :-1], ids[:, 1:]))
        assert not zero.step(0.01).skipped
    for name, tensor in frozen.items():
        assert torch.equal(model.get_parameter(name), tensor), name
        assert model.get_parameter(name).grad is None
    assert all(not torch.equal(model.get_parameter(name), tensor) for name, tensor in trained.items())
    kept = zero.partitions().values()
    assert sum(tensor.nbytes for tensor in kept) == 12 * recipe.trained_parameters
    assert wide_matrices() == before


def test_peft_and_the_merged_model_have_the_loss_that_validation_measured(
    trained: Path, base: Path, data: Path, tmp_path: Path
):
    """The adapter as peft loads it, and as convert merges it, give the same logits."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    out = convert(ConvertOptions(str(trained), tmp_path / "merged"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = plain(ids).logits
        adapted = peft.PeftModel.from_pretrained(plain, latest(trained)).eval()
        by_peft, by_convert = adapted(ids).logits, merged(ids).logits
        ours, _ = load(trained)
        here = ours(ids).logits
    assert (by_peft - before).abs().max() > 0.1
    torch.testing.assert_close(by_convert, by_peft, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(here, by_peft, rtol=1e-5, atol=1e-5)
    # The run's own validation is the same model's.
    finish([*words(data, tmp_path / "zero", out, 0, lora_rank=None, val_every=1, val_rows=8)], tmp_path)
    first, last = (
        [
            json.loads(line)["val_loss"]
            for line in (run / "metrics.jsonl").read_text().splitlines()
            if "val_loss" in line
        ]
        for run in (tmp_path / "zero", trained)
    )
    assert first[0] == pytest.approx(last[-1], abs=2e-6)
    assert last[-1] < last[0] - 0.5


def test_generate_evaluate_and_plan_take_the_run(trained: Path, tmp_path: Path, capsys, monkeypatch):
    greedy = ["--prompt", "if x", "--max-new-tokens", "8", "--temperature", "0", "--quiet", "--device", "cpu"]
    texts = []
    for model in (trained, convert(ConvertOptions(str(trained), tmp_path / "merged", dtype="fp32"))):
        monkeypatch.setattr("sys.argv", ["generate", "--model", str(model), *greedy])
        assert generate.main() == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (tmp_path / "text.txt").write_text("if x is not y then z " * 20)
    monkeypatch.setattr(
        "sys.argv", ["evaluate", "--model", str(trained), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    )
    assert evaluate.main() == 0
    assert (
        plan.main(
            ["--config", str(trained), "--precision", "bf16", "--gpus", "1", "--json", str(tmp_path / "plan.json")]
        )
        == 0
    )
    size = 2 * RANK * 18 * CONFIG.hidden_size
    assert "trained parameters" in capsys.readouterr().out
    planned = json.loads((tmp_path / "plan.json").read_text())["plans"]["norm_gelu"]
    assert planned["checkpoint_bytes"] == 14 * size


def test_an_adapter_that_peft_wrote_is_read(base: Path, data: Path, tmp_path: Path):
    """Also as the start of a full run, and of more adapters."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc1", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load(tmp_path / "adapter")
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    finish(words(data, tmp_path / "more", tmp_path / "adapter", 2), tmp_path)
    again, _ = load(tmp_path / "more")
    change = adapters(tmp_path / "more")
    names = [f"base_model.model.model.layers.1.mlp.fc1.lora_{which}.weight" for which in "BA"]
    expected = ours.layers[1].in_proj.weight[384:] + 2 * change[names[0]] @ change[names[1]]
    torch.testing.assert_close(again.layers[1].in_proj.weight[384:], expected, rtol=1e-5, atol=1e-6)


def damaged(kind: str, folder: Path) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    changes = {
        "dora": {"use_dora": True},
        "bias": {"bias": "all"},
        "kind": {"peft_type": "IA3"},
        "rank": {"r": 0},
        "target": {"target_modules": ["q_proj", "lm_head"]},
        "fewer": {"target_modules": ["q_proj"]},
        "self": {"base_model_name_or_path": str(folder)},
    }
    file.write_text(json.dumps(config | changes.get(kind, {})))
    if kind == "shape":
        tensors = load_file(folder / ADAPTER)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / ADAPTER)
    if kind == "gone":
        (folder / ADAPTER).unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dora", "use_dora is True, which is not supported: merge the adapter with peft"),
        ("bias", "bias is 'all', which is not supported"),
        ("kind", "peft_type is 'IA3', expected 'LORA'"),
        ("rank", "r is 0, expected an integer of at least 1"),
        ("target", r"target_modules has \['lm_head'\], expected"),
        ("fewer", "extra: .*fc1.lora_A.weight"),
        ("self", "at the end of 8 adapters of each other"),
        ("shape", r"misshapen: .* expected \(4, "),
        ("gone", "no adapter_model.safetensors: get the adapter again"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(kind, message, trained: Path, tmp_path: Path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copy(latest(trained) / name, folder / name)
    damaged(kind, folder)
    with pytest.raises(ConversionError, match=message):
        load(folder)


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16"), (1, "fp16")])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(ranks, precision, data: Path, base: Path, tmp_path: Path):
    more = {"precision": precision, "recompute": "all" if ranks == 1 else "norm_gelu"}
    finish(words(data, tmp_path / "whole", base, 4, **more), tmp_path, ranks=ranks)
    command = words(data, tmp_path / "parts", base, 4, **more)
    finish([*command, "--stop-after", "2"], tmp_path, ranks=ranks, expect=INTERRUPTED)
    finish(["--run-dir", str(tmp_path / "parts"), "--resume"], tmp_path, ranks=ranks)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole = adapters(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in adapters(tmp_path / "parts").items())
    assert len(whole) == 2 * CONFIG.num_hidden_layers * len(LORA_TARGETS)


def test_two_ranks_train_as_one(data: Path, base: Path, tmp_path: Path):
    for name, ranks in (("one", 1), ("two", 2)):
        command = words(data, tmp_path / name, base, 3, lora_targets="q_proj,fc2", micro_batch_size=1)
        finish([*command, "--document-isolation"], tmp_path, ranks=ranks)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert len(adapters(tmp_path / "two")) == 2 * 2 * CONFIG.num_hidden_layers


def test_other_weights_under_the_bases_name_are_refused(data: Path, base: Path, tmp_path: Path):
    copy = shutil.copytree(base, tmp_path / "base")
    command = words(data, tmp_path / "run", copy, 3)
    finish([*command, "--stop-after", "1"], tmp_path, expect=INTERRUPTED)
    shutil.rmtree(copy)
    make_source(copy, "hf", base_weights(seed=1))
    output = finish(["--run-dir", str(tmp_path / "run"), "--resume"], tmp_path, expect=2)
    assert "has adapters of other weights than" in " ".join(output.split())
    with pytest.raises(ConversionError, match="was trained on other weights than"):
        load(tmp_path / "run")
    shutil.rmtree(copy)
    with pytest.raises(ConversionError, match="is an adapter of other weights, which cannot be read"):
        load(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "lora_rank=0: must be at least 1"),
        ({"lora_rank": -2}, "lora_rank=-2: must be at least 1"),
        ({"lora_rank": 129}, "at most the model's width of 128"),
        ({"lora_targets": "q_prj"}, "'q_prj' is no projection of phi; did you mean q_proj?"),
        ({"lora_targets": "q_proj,q_proj"}, "name at least one projection, and each once"),
        ({"lora_alpha": 0}, "lora_alpha=0.0: must be greater than 0"),
        ({"lora_rank": None, "lora_alpha": 8}, "add --lora-rank, or leave them out"),
        ({"init_from": None}, "name them with --init-from"),
        ({"implementation": "reference"}, "--lora-rank needs --implementation phi"),
        ({"ema_decay": 0.9}, "--lora-rank and --ema-decay"),
        ({"optimizer": "muon"}, "--lora-rank and --optimizer muon"),
    ],
)
def test_wrong_options_are_refused_before_any_work(changes, message, data: Path, base: Path, tmp_path: Path, capfd):
    assert main(words(data, tmp_path / "run", base, 2, **changes)) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "run").exists()

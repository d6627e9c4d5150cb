"""Accelerated models with the usual training tools: Trainer, PEFT, gradient checkpointing, autocast, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from numerics import errors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers_models import FAMILIES, build, exact_gradients, gradients, padded, pooled, tokens

from phi_fast.kernels import accelerate, restore
from phi_fast.kernels.transformers import loss


def batch(rows: int = 2) -> dict[str, Tensor]:
    ids = tokens(rows)
    return {"input_ids": ids, "labels": ids}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """The gradients have the same bits with and without checkpointing."""
    model = build(name)
    accelerate(model)
    expected = gradients(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, batch())
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert torch.equal(found[key], x), key


@pytest.mark.parametrize("name", ["phi", "gpt-neox"])
def test_gradient_checkpointing_keeps_less(name: str) -> None:
    """Only the input of each layer is kept."""
    kept = []
    for checkpointing in (False, True):
        model = build(name, num_hidden_layers=6)
        accelerate(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**batch(8)).loss  # noqa: B018
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("first", ["accelerate", "peft"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lora(name: str, first: str, side: str | None) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not a dependency: pip install peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    inputs = padded(side) if side else batch()

    def adapted(*, accelerated: bool) -> nn.Module:
        model = build(name)
        if accelerated and first == "accelerate":
            accelerate(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config).train()
        if accelerated and first == "peft":
            accelerate(model)
        return model

    theirs, model = gradients(adapted(accelerated=False), inputs), adapted(accelerated=True)
    assert len(theirs) > 8 and all("lora_" in key for key in theirs if key != "loss")
    assert_close(gradients(model, inputs), theirs)

    merged = model.merge_and_unload()
    restore(merged)
    assert type(merged) is type(build(name))


def test_lora_on_two_projections_leaves_the_rest_on_the_ops() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not a dependency: pip install peft")
    model = peft.get_peft_model(build("phi"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    report = accelerate(model)
    assert {"PhiDecoderLayer", "PhiMLP", "LayerNorm", "PhiAttention"} <= {entry.module for entry in report.replaced}
    assert "logits" not in model(**batch())


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast(name: str) -> None:
    """Products of fp32 weights run in bf16; errors against float64 are like the plain model's under autocast."""
    plain = build(name)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    inputs = [{"input_ids": (ids := tokens(1, 17, seed)), "labels": ids} for seed in range(24)]
    double = copy.deepcopy(plain).double()
    exact = pooled(exact_gradients(double, each) for each in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = (pooled(gradients(model, each) for each in inputs) for model in (plain, accelerated))
    for what, truth in exact.items():
        assert ours[what].dtype == theirs[what].dtype
        (rms, _), (plain_rms, _) = errors(ours[what], truth), errors(theirs[what], truth)
        assert rms <= 2 * plain_rms, f"{name}, {what}: error {rms:.2e}, plain {plain_rms:.2e}"


def test_what_autocast_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_head's product runs in bf16. A 16-bit LayerNorm stays torch's own, which may return fp32."""
    seen, own = [], []
    fused, norm = loss.linear_cross_entropy, nn.LayerNorm.forward
    monkeypatch.setattr(loss, "linear_cross_entropy", lambda h, *a, **k: seen.append(h.dtype) or fused(h, *a, **k))
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda *a: own.append(1) or norm(*a))
    for dtype in (torch.float32, torch.bfloat16):
        model = build("gpt-neox", dtype)
        accelerate(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch())
        assert len(own) == (0 if dtype == torch.float32 else 5)
    assert seen == [torch.bfloat16] * 2


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths, which the collator pads, so that some steps have a mask."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tokens(1, 12 + index // 8 * (index % 5), index)[0]
        return {"input_ids": ids, "labels": ids, "not_an_argument": ids}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    assert "not_an_argument" not in rows[0], "Trainer reads the arguments of forward to drop columns"
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.where(ids != 0, -100),
    }


def trained(model: PreTrainedModel, folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["phi", "gpt-neox", "gpt-j"])
def test_trainer(name: str, tmp_path: Path) -> None:
    """Covers accumulation with unequal rows (num_items_in_batch), padding, evaluation with logits, a saved folder."""
    plain = build(name)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    theirs, ours = (trained(model, tmp_path / str(i)) for i, model in enumerate((plain, accelerated)))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (theirs, ours)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    results = [t.predict(Rows()) for t in (theirs, ours)]
    assert results[1].metrics["test_loss"] == pytest.approx(results[0].metrics["test_loss"], rel=1e-3)

    ours.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(plain)
    assert loaded.config._attn_implementation == plain.config._attn_implementation
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, accelerated.state_dict()[key]), key


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16"])
def test_trainer_options(option: str, tmp_path: Path) -> None:
    """The option bf16 wraps the instance's forward in autocast."""
    plain = build("phi")
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    theirs, ours = (trained(m, tmp_path / str(i), **{option: True}) for i, m in enumerate((plain, accelerated)))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if option != "bf16" else 1e-2)


def test_a_checkpoint_of_the_plain_model_loads_into_the_accelerated(tmp_path: Path) -> None:
    plain, accelerated = build("phi"), build("phi")
    with torch.no_grad():
        plain.lm_head.bias.add_(1.0)
    accelerate(accelerated)
    accelerated.load_state_dict(plain.state_dict(), strict=True)
    assert_close(gradients(accelerated, batch()), gradients(plain, batch()))
    accelerated.save_pretrained(tmp_path)
    assert '"PhiForCausalLM"' in (tmp_path / "config.json").read_text()
    assert "phi_fast" not in (tmp_path / "config.json").read_text()


def test_a_copy_is_its_own_model() -> None:
    model = build("phi")
    accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert gradients(model, batch())["loss"] > 0.1 + gradients(twin, batch())["loss"]
    restore(twin)
    assert "logits" not in model(**batch()) and "logits" in twin(**batch())

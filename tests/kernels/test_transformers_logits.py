"""Logits of a training step with labels are computed when they are read; and the errors if they cannot be."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers_models import FAMILIES, build, padded, tokens

from phi_fast.kernels import accelerate, linear_cross_entropy, restore
from phi_fast.kernels.transformers import loss


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one whenever the loss is computed without logits."""
    found: list[str] = []
    monkeypatch.setattr(
        loss, "linear_cross_entropy", lambda *a, **k: found.append("fused") or linear_cross_entropy(*a, **k)
    )
    return found


def pair(name: str, **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the plain model, the accelerated model), in training mode."""
    plain = build(name, **changes)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    return plain, accelerated


def labelled() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


WAYS: dict[str, Callable[[CausalLMOutputWithPast], Tensor]] = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "position": lambda out: out[1],
    "slice": lambda out: out[:2][1],
    "tuple": lambda out: out.to_tuple()[1],
    "pickle": lambda out: pickle.loads(pickle.dumps(out)).logits,
    "copy": lambda out: copy.copy(out).logits,
    "rebuilt from its items": lambda out: type(out)(dict(out.items())).logits,
    "rebuilt from its leaves": lambda out: pytree.tree_map(lambda x: x, out).logits,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_way_to_the_logits(way: str, checkpointing: bool, fused: list[str]) -> None:
    plain, accelerated = pair("gpt-j")
    if checkpointing:  # GPT-J's own test of it reads logits.shape
        accelerated.gradient_checkpointing_enable()
    batch = padded("left")
    out = accelerated(**batch, output_hidden_states=True)
    assert fused == ["fused"]
    assert list(out) == ["loss", "hidden_states"] and "logits=formed when asked for" in repr(out)
    assert torch.equal(out[0], out.loss)
    assert list(out) == ["loss", "hidden_states"]  # reading the loss does not compute logits
    assert_same(WAYS[way](out), plain(**batch).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_the_models_own(name: str) -> None:
    """The logits have the model's own values and position in the output, and their gradient adds to the loss's."""
    found = []
    for model in pair(name):
        out = model(**labelled(), output_hidden_states=True, use_cache=True)
        out.logits  # noqa: B018
        (out.loss + out.logits.float().square().mean()).backward()
        found.append((list(out), out.to_tuple()[1], {key: p.grad for key, p in model.named_parameters()}))
    (names, logits, gradients), (our_names, our_logits, our_gradients) = found
    assert our_names == names
    assert_same(our_logits, logits)
    for key, x in gradients.items():
        torch.testing.assert_close(our_gradients[key], x, rtol=1e-3, atol=1e-5)


def test_they_are_formed_once() -> None:
    _, model = pair("phi")
    out = model(**labelled())
    assert out.logits is out["logits"] is out[1]


def test_under_the_autocast_of_the_step() -> None:
    found = []
    for model in pair("phi"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**labelled())
        found.append(out.logits)
    theirs, ours = found
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", ["argument", "config", "compiled"])
def test_return_dict_false_has_them_in_their_place(how: str) -> None:
    plain, model = pair("phi")
    theirs = plain(**labelled(), return_dict=False, use_cache=False)
    if how == "config":
        model.config.return_dict = False
    run = torch.compile(model, backend="eager", fullgraph=True) if how == "compiled" else model
    ours = run(**labelled(), use_cache=False, **({} if how == "config" else {"return_dict": False}))
    assert isinstance(ours, tuple) and len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_keep_logits(fused: list[str]) -> None:
    plain = build("llama")
    model = copy.deepcopy(plain)
    report = accelerate(model, keep_logits=True)
    assert {entry.module: entry.note for entry in report.left}["LlamaForCausalLM"].startswith("keep_logits")
    assert "LlamaAttention" in {entry.module for entry in report.replaced}
    out, theirs = model(**labelled()), plain(**labelled())
    assert fused == [] and list(out) == list(theirs) and type(out) is type(theirs)
    assert_same(out.logits, theirs.logits)
    restore(model)
    assert type(model) is type(plain)


def changed_by_an_optimizer(model: nn.Module, out: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return out


def replaced_by_another(model: nn.Module, out: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return out


def freed_as_fsdp_does(model: nn.Module, out: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
    model.lm_head.weight.data.untyped_storage().resize_(0)
    return out


def gathered_as_by_data_parallel(model: nn.Module, out: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
    return type(out)((key, value[None]) for key, value in out.items())


@pytest.mark.parametrize(
    "change",
    [changed_by_an_optimizer, replaced_by_another, freed_as_fsdp_does, gathered_as_by_data_parallel],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("way", ["attribute", "key", "position", "pickle"])
def test_where_they_cannot_be_formed_the_error_says_so(change: Callable, way: str) -> None:
    _, model = pair("phi")
    out = change(model, model(**labelled()))
    assert torch.isfinite(out.loss).all() and torch.isfinite(out[0]).all() and out.keys() == {"loss"}
    assert "logits=formed" in repr(out)
    with pytest.raises(RuntimeError, match=r"^logits: .*accelerate\(model, keep_logits=True\)"):
        WAYS[way](out)


def test_nothing_is_held_longer_than_the_output_and_its_loss() -> None:
    from phi_fast.kernels.transformers.outputs import _of_loss

    _, model = pair("phi")
    held, out = len(_of_loss), model(**labelled())
    assert len(_of_loss) == held + 1
    kept = out.loss.detach()
    del out
    assert len(_of_loss) == held and torch.isfinite(kept)


def test_the_loss_is_saved_without_the_head() -> None:
    _, model = pair("phi")
    file = io.BytesIO()
    torch.save(model(**labelled()).loss.detach(), file)
    assert file.tell() < 4096


@pytest.fixture(name="alone")
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes a launcher's variables, which an earlier trainer may have left and which would make DDP wrap models."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_whose_loss_reads_them(bf16: bool, tmp_path: Path, fused: list[str], alone: None) -> None:
    """TRL's trainer reads them for its metrics. With bf16, accelerate's autocast rebuilds the output from its items."""
    shapes = []

    class Reading(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            value, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            shapes.append(tuple(outputs.logits.shape))
            return (value, outputs) if return_outputs else value

    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        bf16=bf16,
    )
    _, model = pair("phi")
    trainer = Reading(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert shapes == [(2, 17, 96)] * 2 and fused == ["fused"] * 2
    assert trainer.predict(rows).predictions.shape == (4, 17, 96)

"""Fine-tuning on conversations: packed, masked rows against the same conversations alone, by plain PyTorch."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from samples import write_jsonl
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from trainer_processes import arguments, finish, latest, losses, make_corpora, start, until

from phi_fast import Phi
from phi_fast.config import PhiConfig
from phi_fast.conversion.folder import chat_files
from phi_fast.conversion.source import Source
from phi_fast.convert import ConvertOptions, convert
from phi_fast.data import Batch, Mixture, TokenLoader
from phi_fast.data.chat import DEFAULT_TEMPLATE
from phi_fast.errors import UsageError
from phi_fast.kernels import use
from phi_fast.model.merged import to_merged, to_split
from phi_fast.model.reference import ReferencePhi
from phi_fast.prepare import main as prepare
from phi_fast.terminal import console
from phi_fast.training.corpora import Corpora
from phi_fast.training.distributed import World
from phi_fast.training.options import Options, parse
from phi_fast.training.parameters import parameter_groups

pytest.importorskip("transformers")

LENGTH = 96
MIXED = {"mixture": "chat=3,docs=1"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora "docs" and "code", and "chat": conversations that train a few tokens of many, or many of few."""
    data = make_corpora(tmp_path_factory.mktemp("chats") / "data")
    words = random.Random(3)
    records = []
    for i in range(60):
        long, short = " ".join(words.choices(["ab", "cd", "e"], k=12)), words.choice("xyz")
        question, answer = (long, short) if i % 2 else (short, long)
        records.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    write_jsonl(data / "chat.jsonl", records)
    words = [str(data / "chat.jsonl"), "--tokenizer", str(data), "--out", str(data / "chat"), "--workers", "1"]
    assert prepare([*words, "--chat", "--row-tokens", str(LENGTH), "--validation", "0.2"]) == 0
    return data


def options(data: Path, run: Path, steps: int, **changes: object) -> list[str]:
    """Make the command line of a run on the conversations."""
    common = {"sequence_length": LENGTH, "tokens": steps * 4 * LENGTH, "mixture": "chat=1", "document_isolation": True}
    return arguments(data, run, steps, **common | changes)


def conversations(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(input ids, labels) of each document of a batch by itself."""
    ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(batch.cu_seqlens.tolist())]


def alone(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """(sum of the losses of the trained labels, their number), one document at a time."""
    parts = [
        F.cross_entropy(model(ids[None]).logits[0], labels, reduction="sum") for ids, labels in conversations(batch)
    ]
    return torch.stack(parts).sum(), int((batch.labels != -100).sum())


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference."""
    return float((found.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("cpp", torch.float32),
        ("cpp", torch.bfloat16),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_packed_rows_have_the_loss_and_gradients_of_conversations_alone(chats: Path, backend: str, dtype: torch.dtype):
    """Rows come one by one, so that plain PyTorch computes the same angles; errors are those of three models."""
    errors, plainly = defaultdict(float), defaultdict(float)
    with TokenLoader(Mixture.of({"chat": (chats / "chat", 1)}), LENGTH, 1, document_isolation=True) as loader:
        batches = [next(loader) for _ in range(3)]
    for seed, batch in enumerate(batches):
        exact, plain, ours = losses_and_gradients(batch, backend, dtype, seed)
        for name, value in exact.items():
            if dtype == torch.float64:  # positions run on over a row's conversations, and angles are computed in fp32
                assert (ours[name] - value).abs().max() < 1e-5 * value.abs().max(), name
            errors[name] += error(ours[name], value) ** 2
            plainly[name] += max(error(plain[name], value), error(value.to(dtype), value)) ** 2
    if dtype != torch.float64:
        for name in errors:
            assert errors[name] ** 0.5 <= 2 * plainly[name] ** 0.5, name


def losses_and_gradients(batch: Batch, backend: str, dtype: torch.dtype, seed: int) -> list[dict[str, Tensor]]:
    """The loss and the gradients, by name, of conversations alone in float64, of plain PyTorch and of the kernels."""
    shape = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}
    config = PhiConfig.preset("phi-tiny").replace(**shape)
    torch.manual_seed(seed)
    plain = ReferencePhi(config).to(dtype)
    exact = ReferencePhi(config).double()
    exact.load_state_dict(plain.state_dict())
    model = Phi(config).to(dtype)
    model.load_state_dict(to_merged(plain.state_dict()))
    assert len(batch.cu_seqlens) > 2
    assert 0 < batch.trained < batch.labels.numel()
    total, count = alone(exact, batch)
    assert count == batch.trained
    found = [total / count, plain(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens).loss]
    with use(backend):
        given = {"cu_seqlens": batch.cu_seqlens, "reduction": "sum"}
        found.append(model(batch.input_ids, batch.labels, **given).loss / batch.trained)
        for loss in found:
            loss.backward()
    gradients = [{name: p.grad for name, p in one.named_parameters()} for one in (exact, plain, model)]
    gradients[2] = to_split(gradients[2])
    return [{"loss": loss.detach(), **of} for loss, of in zip(found, gradients, strict=True)]


def plain_losses(given: Options, world_and_steps: int) -> tuple[list[float], list[float], list[int]]:
    """Train the reference with torch's AdamW on documents one at a time, with the mean over the global batch's labels.

    Returns the losses, the means of micro-batches' means instead, and the numbers of trained labels.
    """
    torch.manual_seed(given.seed)
    model = ReferencePhi(given.model)
    if given.implementation == "phi":
        torch.manual_seed(given.seed)
        model.load_state_dict(to_split(Phi(given.model).state_dict()))
    groups = parameter_groups(model, given)
    optimizer = torch.optim.AdamW(groups, lr=given.learning_rate, betas=given.betas, eps=given.eps)
    mixture = Mixture.of({name: (given.data / name, weight) for name, weight in given.mixture.items()})
    found, other, counts = [], [], []
    rows = given.global_batch_size // world_and_steps
    with TokenLoader(mixture, LENGTH, rows, seed=given.seed, document_isolation=True) as loader:
        for _ in range(given.steps):
            sums = [alone(model, next(loader)) for _ in range(world_and_steps)]
            count = sum(number for _, number in sums)
            loss = torch.stack([total for total, _ in sums]).sum() / count
            loss.backward()
            clip_grad_norm_(model.parameters(), given.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            other.append(float(sum(total.detach() / number for total, number in sums)) / world_and_steps)
            counts.append(count)
    return found, other, counts


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"micro_batch_size": 1}),
        (1, {"micro_batch_size": 1, "implementation": "reference", "zero_step": "deepspeed"}),
        (2, {"micro_batch_size": 1}),
        (2, {"micro_batch_size": 1, "reduce_gradients": "micro-batch", **MIXED}),
        (2, {"micro_batch_size": 1, "zero_step": "deepspeed"}),
    ],
)
def test_the_loss_is_the_mean_over_the_trained_labels_of_the_global_batch(
    chats: Path, tmp_path: Path, ranks: int, changes: dict
):
    words = options(chats, tmp_path / "run", 4, **changes)
    expected, means, counts = plain_losses(parse(words), 4)
    assert means != pytest.approx(expected, abs=1e-3)  # the test would see a mean of means
    finish(words, tmp_path / "output", ranks=ranks)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["trained_tokens"] for record in records if record["step"]] == counts


@pytest.mark.parametrize("kind", [Phi, ReferencePhi])
def test_a_micro_batch_without_a_trained_label_adds_nothing(kind: type):
    model = kind(PhiConfig.preset("phi-tiny").replace(vocab_size=320, hidden_size=64, num_attention_heads=1))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    loss = model(ids, torch.full_like(ids, -100), reduction="sum").loss * 0.5
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        ("fp16", {}),
        ("fp32", {"lora_rank": 2}),
        pytest.param("fp16", {"lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param("bf16", {"optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param("fp32", {"ema_decay": 0.5}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_killed_and_resumed_bit_for_bit(chats: Path, tmp_path: Path, precision: str, more: dict[str, Any]):
    """kill -9 after a checkpoint, then --resume: the losses, weights and optimizer of a run that nothing stopped."""
    finish(arguments(chats, tmp_path / "base", 2), tmp_path / "output")
    changes = {"precision": precision, "init_from": tmp_path / "base", "save_every": 2, "val_every": 4, **MIXED, **more}
    finish(options(chats, tmp_path / "whole", 12, **changes), tmp_path / "output")
    (trainer,) = start(options(chats, tmp_path / "run", 12, **changes), tmp_path / "killed")
    until(lambda: (tmp_path / "run" / "checkpoints" / "step-2").exists() or trainer.status is not None)
    trainer.signal(signal.SIGKILL)
    trainer.wait()
    finish(["--run-dir", str(tmp_path / "run"), "--resume"], tmp_path / "output")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    files = sorted(latest(tmp_path / "whole").glob("*.safetensors"))
    assert len(files) >= 2  # the weights or the adapters, and the optimizer
    for file in files:
        there, here = load_file(file), load_file(latest(tmp_path / "run") / file.name)
        assert there.keys() == here.keys()
        for name, tensor in here.items():
            assert torch.equal(tensor, there[name]), f"{file.name}: {name}"


def test_the_recipe_from_weights_to_a_model_with_its_template(chats: Path, tmp_path: Path):
    finish(arguments(chats, tmp_path / "base", 2), tmp_path / "output")
    words = ["--recipe", "sft", "--init-from", str(tmp_path / "base"), "--data", str(chats), "--run-dir"]
    words += [str(tmp_path / "run"), "--sequence-length", str(LENGTH), "--global-batch-size", "4", "--epochs", "1.5"]
    words += ["--learning-rate", "1e-3", "--precision", "fp32", "--sample-tokens", "4", "--sample-prompt", "x"]
    printed = finish(words, tmp_path / "output")
    assert "Instruct: x\nOutput:" in printed
    rows = json.loads((chats / "chat" / "manifest.json").read_text())["splits"]["train"]["tokens"] // LENGTH
    assert len(losses(tmp_path / "run")) == -(-rows * 3 // 2 // 4)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["epochs"], config["tokens"]) == (None, len(losses(tmp_path / "run")) * 4 * LENGTH)
    assert config["tokenizer"] == "data"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    folder = convert(ConvertOptions(str(tmp_path / "run"), tmp_path / "hf"))
    for place in (tmp_path / "run", folder):
        assert chat_files(Source.open(place)).template == DEFAULT_TEMPLATE
    from transformers import AutoTokenizer

    asked = [{"role": "user", "content": "x"}]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "Instruct: x\nOutput:"
    assert theirs.eos_token == "<|endoftext|>"


def test_the_token_that_ends_an_answer_ends_the_models_texts(chats: Path, tmp_path: Path):
    """A chat template's own token, where the other corpora of the mixture have a delimiter."""
    data = shutil.copytree(chats, tmp_path / "data")
    manifest = json.loads((data / "chat" / "manifest.json").read_text())
    manifest["delimiter"]["id"] = 7
    (data / "chat" / "manifest.json").write_text(json.dumps(manifest))
    world = World(0, 1, 0, torch.device("cpu"))
    for mixture, end in (("chat=3,docs=1", 7), ("docs=1,code=1", 0)):
        given = parse(options(data, tmp_path / "run", 2, mixture=mixture))
        model = Corpora(given, world, console(quiet=True)).model
        assert (model.bos_token_id, model.eos_token_id) == (end, end)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "sft"], "--recipe sft trains a model further: name its weights with --init-from"),
        (["--epochs", "0"], "epochs=0.0: must be greater than 0, and finite"),
        (["--epochs", "nan"], "epochs=nan: must be greater than 0, and finite"),
        (["--epochs", "2", "--mixture-stages", "3:docs=1"], "--epochs cannot be counted over a mixture that changes"),
        (["--epochs", "2", "--tokens", "99"], "--tokens 99 and --epochs 2.0 both set the length: give one of them"),
    ],
)
def test_options_that_cannot_be_carried_out(words: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        parse(words).check()


def test_tokens_and_epochs_replace_each_others_default():
    assert parse(["--epochs", "2"]).tokens is None
    assert parse(["--recipe", "sft", "--tokens", "99"]).epochs is None
    assert parse(["--recipe", "sft"]).epochs == 3


def test_rows_of_another_length_are_refused_before_any_work(chats: Path, tmp_path: Path):
    printed = finish(options(chats, tmp_path / "run", 2, sequence_length=32), tmp_path / "output", expect=2)
    assert f"use --sequence-length {LENGTH}" in printed
    assert not (tmp_path / "run").exists()

"""200 steps of fp16 under ZeRO-2 on real text stay as close to fp32 as plain torch's fp16 training does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from trainer_processes import finish, losses

from phi_fast.data import Mixture, TokenLoader, stdlib_corpus, vocabulary
from phi_fast.model import Phi
from phi_fast.model.merged import to_split
from phi_fast.model.reference import ReferencePhi
from phi_fast.training.options import Options, parse
from phi_fast.training.parameters import parameter_groups

STEPS, WINDOW, SCALE = 200, 50, 1024.0
VOCABULARY = 512


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenize the standard library's documentation and code with a vocabulary small enough for fp16 on a CPU."""
    folder = tmp_path_factory.mktemp("small")
    texts = {
        "docs": stdlib_corpus.language_reference()[:60],
        "code": [source for _, source in sorted(stdlib_corpus.read_sources().items())[:60]],
    }
    tokenizer = vocabulary.byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[vocabulary.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["docs"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, documents in texts.items():
        stdlib_corpus._write_component(folder / name, documents, tokenizer)
    return folder


CUT = {
    "model.vocab-size": VOCABULARY,
    "model.hidden-size": 64,
    "model.num-attention-heads": 1,
    "model.num-hidden-layers": 2,
}
"""phi-tiny cut to 2 layers of width 64."""


def arguments(data: Path, run: Path, **changes: object) -> list[str]:
    """Make the command line: phi-tiny on rows of 32 tokens, because a CPU multiplies fp16 slowly.

    The small corpus gets the smaller model. The full corpus gets the paper's learning rate: at phi-tiny's own rate,
    with so few tokens per step, noise grows to 0.1 within these steps.
    """
    options: dict[str, object] = {
        **(CUT if data.name.startswith("small") else {"learning-rate": 2e-4}),
        "data": data,
        "tokenizer": data / "tokenizer.json",
        "run-dir": run,
        "sequence-length": 32,
        "global-batch-size": 4,
        "tokens": STEPS * 4 * 32,
        "sample-tokens": 0,
        "val-every": 0,
        "loss-scale-window": WINDOW,
        "initial-loss-scale": SCALE,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def plain_loop(options: Options, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor], scaler_on: bool) -> Tensor:
    """Train the reference model with torch's AdamW and GradScaler from the trainer's initial weights; return losses."""
    torch.manual_seed(options.seed)
    model = ReferencePhi(options.model)
    torch.manual_seed(options.seed)
    model.load_state_dict(to_split(Phi(options.model).state_dict()))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options), lr=options.learning_rate, betas=options.betas, eps=options.eps
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=WINDOW, enabled=scaler_on)
    mixture = Mixture.of({name: (options.data / name, weight) for name, weight in options.mixture.items()})
    result = []
    with TokenLoader(mixture, options.sequence_length, options.global_batch_size, seed=options.seed) as loader:
        for _ in range(STEPS):
            batch = next(loader)
            loss = loss_of(model, batch.input_ids, batch.labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clipping)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            result.append(loss.item())
    return torch.tensor(result)


def in_fp32(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids, labels).loss


def in_fp16(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return model(input_ids, labels).loss


@pytest.fixture(scope="module")
def whole_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default corpus with its 8192 ids, as `make train` uses it."""
    folder = tmp_path_factory.mktemp("stdlib")
    stdlib_corpus.prepare(folder / "data")
    return folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["data", "whole_data"])
def test_fp16_follows_fp32_as_closely_as_torchs_own_fp16(
    corpus: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(corpus)
    options = parse(arguments(data, tmp_path / "unused"))
    expected = plain_loop(options, in_fp32, scaler_on=False)
    band = (plain_loop(options, in_fp16, scaler_on=True) - expected).abs()
    assert band.max() < 0.01
    runs = {
        "one rank": {"ranks": 1},
        "two ranks": {"ranks": 2},
        "four ranks": {"ranks": 4},
        "four accumulated": {"ranks": 1, "gradient_accumulation_steps": 4},
    }
    curves = {}
    for name, changes in runs.items():
        ranks = changes.pop("ranks")
        words = arguments(data, tmp_path / name, precision="fp16", **changes)
        finish(words, tmp_path / "output", ranks=ranks, timeout=900)
        curves[name] = torch.tensor(losses(tmp_path / name))
        deviation = (curves[name] - expected).abs()
        # Allow 1.5 times autocast's deviation: weights and residual stream are fp16 here, and fp32 under autocast.
        assert deviation.mean() < 1.5 * band.mean(), name
        assert deviation.max() < 1.5 * band.max(), name
        lines = (tmp_path / name / "metrics.jsonl").read_text()
        assert '"skipped": true' not in lines
        assert f'"loss_scale": {SCALE * 8}' in lines
    for name, curve in curves.items():
        assert (curve - curves["one rank"]).abs().max() < 1.5 * band.max(), name

"""--document-isolation: the trainer's losses equal those of a plain loop over single documents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from trainer_processes import arguments, finish, losses

from phi_fast import Phi
from phi_fast.data import Mixture, TokenLoader
from phi_fast.model.merged import to_split
from phi_fast.model.reference import ReferencePhi
from phi_fast.train import INTERRUPTED
from phi_fast.training.options import Options, parse
from phi_fast.training.parameters import parameter_groups


def plain_losses(options: Options) -> tuple[list[float], int]:
    """Train the reference model with torch's AdamW on single documents; returns losses, and documents minus rows."""
    torch.manual_seed(options.seed)
    model = ReferencePhi(options.model)
    if options.implementation == "phi":
        torch.manual_seed(options.seed)
        model.load_state_dict(to_split(Phi(options.model).state_dict()))
    groups = parameter_groups(model, options)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)
    mixture = Mixture.of({name: (options.data / name, weight) for name, weight in options.mixture.items()})
    found, more = [], 0
    length, rows = options.sequence_length, options.global_batch_size
    with TokenLoader(mixture, length, rows, seed=options.seed, document_isolation=True) as loader:
        for _ in range(options.steps):
            batch = next(loader)
            ids = batch.input_ids.flatten()
            cuts = batch.cu_seqlens.tolist()
            more += len(cuts) - 1 - rows
            logits = torch.cat([model(ids[a:b][None]).logits[0] for a, b in itertools.pairwise(cuts)])
            loss = F.cross_entropy(logits, batch.labels.flatten())
            loss.backward()
            clip_grad_norm_(model.parameters(), options.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found, more


@pytest.mark.parametrize("implementation", ["phi", "reference"])
def test_isolated_documents(data: Path, tmp_path: Path, implementation: str) -> None:
    common = {"sequence_length": 48, "tokens": 5 * 4 * 48, "val_every": 5, "implementation": implementation}
    words = arguments(data, tmp_path / "run", 5, document_isolation=True, **common)
    expected, more = plain_losses(parse(words))
    assert more >= 5
    finish([*words, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    finish(["--run-dir", str(tmp_path / "run"), "--resume"], tmp_path / "output")
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)
    finish(arguments(data, tmp_path / "joined", 5, **common), tmp_path / "output")
    assert losses(tmp_path / "joined") != pytest.approx(expected, abs=1e-3)
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("run", "joined")]
    assert first[0]["val_loss"] != first[1]["val_loss"]


def test_a_run_goes_on_as_it_began(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", 4)
    finish([*words, "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    again = ["--run-dir", str(tmp_path / "run"), "--resume", "--document-isolation"]
    assert "document_isolation is False, now True" in finish(again, tmp_path / "output", expect=2)

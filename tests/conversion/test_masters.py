"""`convert --dtype fp32` of a 16-bit run gives the optimizer's fp32 weights, not its 16-bit weights as fp32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import make_source, random_weights
from safetensors.torch import load_file, save_file
from trainer_processes import arguments, finish, latest, make_corpora

from phi_fast.conversion.errors import ConversionError
from phi_fast.convert import ConvertOptions, convert
from phi_fast.model.merged import to_split


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    finish(arguments(data, folder / "run", 3, precision="bf16"), folder / "output", ranks=2)
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(2, {"precision": "fp16", "decay": "all", "initial_loss_scale": 256}, marks=pytest.mark.slow),
        (2, {"precision": "bf16", "implementation": "reference", "model.num-hidden-layers": 2}),
        pytest.param(1, {"precision": "bf16", "zero_step": "deepspeed"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_each_weight_is_what_the_16_bit_one_was_rounded_from(data: Path, tmp_path: Path, ranks, changes) -> None:
    """Checked by torch's rounding: with the flat parts in any other order the weights would differ."""
    finish(arguments(data, tmp_path / "run", 3, **changes), tmp_path / "output", ranks=ranks)
    dtype = torch.float16 if changes["precision"] == "fp16" else torch.bfloat16
    stored = load_file(latest(tmp_path / "run") / "model.safetensors")
    split = stored if "implementation" in changes else to_split(stored)
    told: list[str] = []
    out = convert(ConvertOptions(str(tmp_path / "run"), tmp_path / "out", dtype="fp32"), tell=told.append)
    assert told == ["fp32 weights: the run's own, not its 16-bit weights"]
    written = load_file(out / "model.safetensors")
    assert written.keys() == split.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(dtype), split[name]), name
        moved = name.endswith("weight") and "norm" not in name
        assert not moved or not torch.equal(tensor, split[name].float()), name


def test_masters_are_deepspeeds_own(run: Path, tmp_path: Path) -> None:
    """Computes the layout by hand: rank files joined end to end, in the order of the first group's matrices."""
    out = convert(ConvertOptions(str(run), tmp_path / "out", dtype="fp32", to="merged"))
    written = load_file(out / "model.safetensors")
    folder = latest(run)
    flat = torch.cat([load_file(folder / f"rank-{rank}-of-2.safetensors")["master.0"] for rank in (0, 1)])
    matrices = ("embed_tokens.weight", "layers.0.in_proj.weight", "layers.0.out_proj.weight", "lm_head.weight")
    expected = torch.cat([written[name].flatten() for name in matrices])
    assert torch.equal(flat[: len(expected)], expected)


def copy_of(run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "step"
    copy.mkdir()
    for path in latest(run).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    return copy


def test_masters_of_another_model_or_order_are_refused(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path)
    first, second = (copy / f"rank-{rank}-of-2.safetensors" for rank in (0, 1))
    parts = load_file(first), load_file(second)
    save_file(parts[1], first)
    save_file(parts[0], second)
    with pytest.raises(ConversionError, match=r"the fp32 weights of .* are not those .* --dtype keep"):
        convert(ConvertOptions(str(copy), tmp_path / "out", dtype="fp32"))
    save_file({name: tensor[:100].clone() for name, tensor in parts[0].items()}, first)
    with pytest.raises(ConversionError, match="the fp32 weights belong to another model"):
        convert(ConvertOptions(str(copy), tmp_path / "out", dtype="fp32"))
    second.unlink()
    save_file(parts[0], first)
    with pytest.raises(ConversionError, match=r"has no rank-1-of-2\.safetensors, which holds a part of the fp32"):
        convert(ConvertOptions(str(copy), tmp_path / "out", dtype="fp32"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_where_there_are_none_it_is_said(run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path)
    for rank in (0, 1):
        (copy / f"rank-{rank}-of-2.safetensors").unlink()
    source = make_source(tmp_path / "source", "hf", random_weights(torch.float16))
    for folder in (copy, source):
        command = [sys.executable, "-m", "phi_fast.convert", str(folder), str(tmp_path / f"{folder.name}-out")]
        done = subprocess.run([*command, "--dtype", "fp32"], capture_output=True, text=True, check=True)
        assert "fp32 weights: the 16-bit weights, widened" in done.stderr
        stored, written = (load_file(f / "model.safetensors") for f in (folder, tmp_path / f"{folder.name}-out"))
        stored = to_split(stored) if folder == copy else stored
        assert all(torch.equal(written[name], tensor.float()) for name, tensor in stored.items())

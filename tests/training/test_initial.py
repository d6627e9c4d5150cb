"""--init-from: a run starts from another model's weights, and only its first start needs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import CONFIG, make_source, random_weights, tiny_tokenizer
from safetensors.torch import load_file, save_file
from trainer_processes import arguments, finish, losses, weights

from phi_fast.conversion import published_layouts
from phi_fast.conversion.load import load
from phi_fast.data import sequential_rows
from phi_fast.model.merged import to_merged
from phi_fast.train import INTERRUPTED, main
from phi_fast.training.initial import _difference, parse_on

ROWS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights in every layout."""
    root = tmp_path_factory.mktemp("initial")
    return {name: make_source(root / name, name, random_weights()) for name in published_layouts.NAMES}


def words(data: Path, run: Path, init_from: Path | str, steps: int = 0, **changes: object) -> list[str]:
    """Make the command line of a run from `init_from`, whose shape and tokenizer are not named."""
    given = arguments(data, run, steps, **{"init_from": init_from, "val_rows": ROWS, "val_every": 100, **changes})
    pairs = list(zip(given[::2], given[1::2], strict=True))
    return [word for pair in pairs if not pair[0].startswith(("--model.", "--tokenizer")) for word in pair]


def first_validation(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["val_losses"]


@pytest.mark.parametrize("layout", published_layouts.NAMES)
def test_no_step_gives_transformers_validation_loss(layout: str, folders: dict[str, Path], data: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["hf"], dtype=torch.float32)
    finish(words(data, tmp_path / "run", folders[layout]), tmp_path / "output")
    for corpus, found in first_validation(tmp_path / "run").items():
        [(ids, labels)] = sequential_rows(data / corpus, "validation", 16, batch=ROWS, stop=ROWS)
        with torch.no_grad():
            logits = model(ids).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())
        assert found == pytest.approx(float(expected), abs=1e-6)
    loaded, _ = load(folders[layout])
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, loaded.get_parameter(name)), name


def test_from_a_run_with_the_optimizer_anew_and_a_resume_without_the_source(data: Path, tmp_path: Path):
    """The second run equals one that starts from a converted copy; neither resume sees the weights it began with."""
    finish(arguments(data, tmp_path / "first", 3), tmp_path / "output")
    start = tmp_path / "second"
    finish([*words(data, start, tmp_path / "first", 4), "--stop-after", "2"], tmp_path / "output", expect=INTERRUPTED)
    finish(words(data, tmp_path / "whole", tmp_path / "first", 4), tmp_path / "output")
    shutil.rmtree(tmp_path / "first")
    finish(["--run-dir", str(start), "--resume"], tmp_path / "output")
    assert losses(start) == losses(tmp_path / "whole")
    for name, tensor in weights(start).items():
        assert torch.equal(tensor, weights(tmp_path / "whole")[name]), name
    assert json.loads((start / "config.json").read_text())["init_from"] == str(tmp_path / "first")
    other = ["--run-dir", str(start), "--resume", "--init-from", "elsewhere"]
    assert "init_from is" in finish(other, tmp_path / "output", expect=2)


def test_an_elastic_start_goes_on_without_the_source(folders: dict[str, Path], data: Path, tmp_path: Path):
    source = shutil.copytree(folders["hf"], tmp_path / "source")
    command = [*words(data, tmp_path / "run", source, 3), "--elastic"]
    finish([*command, "--stop-after", "1"], tmp_path / "output", expect=INTERRUPTED)
    shutil.rmtree(source)
    finish(command, tmp_path / "output")
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("implementation", ["phi", "reference"])
def test_two_ranks_train_as_one(implementation: str, folders: dict[str, Path], data: Path, tmp_path: Path):
    options = {"steps": 3, "implementation": implementation}
    finish(words(data, tmp_path / "one", folders["hf"], **options), tmp_path / "output")
    finish(words(data, tmp_path / "two", folders["hf"], **options), tmp_path / "output", ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_from_the_hubs_cache_without_a_network(folders, data, tmp_path, monkeypatch):
    """The cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    cache = tmp_path / "hub" / "models--someone--tiny-phi"
    snapshot, blobs = cache / "snapshots" / "0123456789abcdef", cache / "blobs"
    for folder in (snapshot, blobs, cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123456789abcdef")
    for file in folders["hf"].iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / file.name)
    command = [sys.executable, "-m", "phi_fast.train", *words(data, tmp_path / "run", "someone/tiny-phi")]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # of a run in this process
    subprocess.run(command, check=True, timeout=180)
    expected = to_merged(load_file(folders["hf"] / "model.safetensors"))
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name


def broken(kind: str, source: Path) -> Path | str:
    """Damage a copy of a model folder; returns what to name as --init-from."""
    weights_file, config = source / "model.safetensors", source / "config.json"
    if kind == "missing":
        return source / "nothing"
    if kind == "file":
        return weights_file
    if kind == "cut":
        weights_file.write_bytes(weights_file.read_bytes()[:-100])
    if kind == "llama":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "silu"}))
    if kind == "wider":
        config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 512}))
    if kind == "tensor":
        state = load_file(weights_file)
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:, :-1].contiguous()
        save_file(state, weights_file)
    if kind == "tokens":
        tokenizer = json.loads(tiny_tokenizer().to_str())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    return source


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is neither a folder"),
        ("file", "model.safetensors is a file, expected a folder"),
        ("cut", "is damaged or cut short"),
        ("llama", "hidden_act is silu, expected gelu_new"),
        ("wider", r"misshapen: model.embed_tokens.weight is (320, 128), expected (512, 128)"),
        ("tensor", r"misshapen: model.embed_tokens.weight is (320, 127), expected (320, 128)"),
        ("tokens", "has other tokens than the corpora: 'b' is id"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_before_any_work(kind, message, folders, data, tmp_path, capfd):
    source = broken(kind, shutil.copytree(folders["hf"], tmp_path / "source"))
    assert main(words(data, tmp_path / "run", source)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "found"), [("hidden-size", 64, 128), ("num-hidden-layers", 1, 2), ("rope-theta", 5000.0, 1e4)]
)
def test_a_shape_that_contradicts_the_weights_is_named(option, value, found, folders, data, tmp_path, capfd):
    heads = ["--model.num-attention-heads", "1"] if option == "hidden-size" else []
    assert main([*words(data, tmp_path / "run", folders["hf"]), f"--model.{option}", str(value), *heads]) == 2
    assert f"contradicts --model.{option} {value}, where the weights have {found}" in capfd.readouterr().err
    same = [*words(data, tmp_path / "run", folders["hf"]), "--model.hidden-size", str(CONFIG.hidden_size)]
    assert main(same) == 0


def test_new_tokens_may_take_the_place_of_padding():
    plain, more = tiny_tokenizer(), tiny_tokenizer()
    more.add_special_tokens(["<|im_start|>"])
    assert _difference(plain, more) is None
    assert _difference(more, plain) is None
    other = tiny_tokenizer()
    other.add_special_tokens(["<|im_end|>"])
    assert _difference(more, other) == "id 257 is '<|im_start|>' there and '<|im_end|>' here"


def test_the_other_defaults_follow_the_weights():
    options = parse_on(CONFIG, ["--recipe", "sft"], "somewhere")
    assert (options.model.hidden_size, options.sequence_length, options.tokenizer) == (128, 64, "data")
    assert parse_on(CONFIG, [], "somewhere").tokenizer == "stdlib"


PEAK = """
import resource, sys
import torch
from phi_fast.config import PhiConfig
from phi_fast.conversion.source import Source
from phi_fast.training.initial import initial_model
from phi_fast.training.options import Options
source = Source.open(sys.argv[1])
options = Options(model=source.config)
torch.zeros(1).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = initial_model(options, source, torch.bfloat16, torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_weights_load_in_less_than_one_and_a_half_times_their_bytes(tmp_path: Path):
    """A model of 24 layers, where the embedding has phi-1.5's share of the parameters."""
    config = CONFIG.replace(vocab_size=12800, hidden_size=512, num_hidden_layers=24, num_attention_heads=8)
    state = random_weights(torch.bfloat16, config)
    size = sum(tensor.nbytes for tensor in state.values())
    assert size > 150e6
    source = make_source(tmp_path / "source", "hf", random_weights(torch.bfloat16))
    (source / "config.json").write_text(
        json.dumps({**json.loads((source / "config.json").read_text()), **config.to_dict(), "intermediate_size": 2048})
        .replace('"num_key_value_heads": 2', '"num_key_value_heads": 8')
    )  # fmt: skip
    save_file(state, source / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", PEAK, str(source)], check=True, timeout=300, capture_output=True)
    assert int(done.stdout) < 1.5 * size

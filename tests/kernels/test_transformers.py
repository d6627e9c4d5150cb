"""accelerate on Hugging Face models: loss and gradients against float64 beside the plain model's, and restore."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from numerics import errors
from torch import Tensor, nn
from transformers_models import FAMILIES, MODELS, build, exact_gradients, gradients, padded, pooled, tokens

from phi_fast.kernels import accelerate, attention, restore, use
from phi_fast.kernels.transformers import attention as replaced_attention

DTYPES = (torch.float32, torch.bfloat16)
SEEDS = 8


def compare(name: str, dtype: torch.dtype, batches: list[dict]) -> None:
    """Asserts for loss and every gradient over all batches that the accelerated model's error against float64 is at
    most twice the plain model's in root mean square and at most four times its largest (as in phi_fast.verify)."""
    plain = build(name, dtype)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    double = copy.deepcopy(plain).double()
    exact = pooled(exact_gradients(double, batch) for batch in batches)
    theirs = pooled(gradients(plain, batch) for batch in batches)
    ours = pooled(gradients(accelerated, batch) for batch in batches)
    assert ours.keys() == theirs.keys() == exact.keys()
    for what, truth in exact.items():
        rms, largest = errors(ours[what], truth)
        limits = (errors(x, truth) for x in (theirs[what], truth.to(theirs[what].dtype)))
        plain_rms, plain_largest = (max(pair) for pair in zip(*limits, strict=True))
        assert rms <= 2 * plain_rms, f"{name}, {what}: error {rms:.2e}, plain {plain_rms:.2e}"
        assert largest <= 4 * plain_largest, f"{name}, {what}: largest error {largest:.2e}, plain {plain_largest:.2e}"


def unpadded(seed: int, rows: int = 2, length: int = 17) -> dict[str, Tensor]:
    ids = tokens(rows, length, seed)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    seeds = 3 * SEEDS if dtype == torch.bfloat16 else SEEDS  # with 8 losses, bf16 errors still depend on chance
    compare(name, dtype, [unpadded(seed) for seed in range(seeds)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding(name: str, side: str) -> None:
    compare(name, torch.float32, [padded(side, seed) for seed in range(SEEDS)])


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_positions_that_differ_by_row(name: str, use_cache: bool | None) -> None:
    """A constant offset would not show: rotary is relative. The mask keeps transformers from finding documents."""
    positions = torch.arange(9) * torch.tensor([[1], [3]])
    options = {"position_ids": positions, "attention_mask": torch.ones_like(positions), "use_cache": use_cache}
    compare(name, torch.float32, [{**unpadded(seed, 2, 9), **options} for seed in range(SEEDS)])


@pytest.mark.parametrize("use_cache", [None, False])
def test_positions_that_start_again(use_cache: bool | None) -> None:
    """transformers treats such positions as separate documents and makes a mask, except when it builds a KV cache."""
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    options = {"position_ids": positions, "use_cache": use_cache}
    compare("phi", torch.float32, [{**unpadded(seed, 1, 12), **options} for seed in range(SEEDS)])


def test_num_items_in_batch_is_what_the_sum_is_divided_by() -> None:
    items = torch.tensor(100)
    compare("phi", torch.float32, [{**padded("right", seed), "num_items_in_batch": items} for seed in range(SEEDS)])


@pytest.mark.parametrize("name", MODELS)
def test_the_ops_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that the report lists as replaced run on the ops: a plain step never calls their own forward."""
    model = build(name)
    report = accelerate(model)
    left = {entry.module for entry in report.left}  # StableLM's norms per head have no bias, its other norms have one
    replaced = {entry.module for entry in report.replaced} - left - {"PhiDecoderLayer"}
    assert replaced
    calls = []
    for module in model.modules():
        base = getattr(type(module), "_phi_fast_base", None)
        if base is not None and base.__name__ in replaced:
            forward = base.forward
            monkeypatch.setattr(
                base, "forward", lambda *a, f=forward, n=base.__name__, **k: calls.append(n) or f(*a, **k)
            )
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    assert list(out) == ["loss"]
    assert calls == []


def test_the_report_counts_and_explains() -> None:
    report = accelerate(build("llama"))
    assert report.model == "LlamaForCausalLM"
    assert {entry.module: entry.count for entry in report.replaced} == {
        "LlamaForCausalLM": 1,
        "LlamaAttention": 2,
        "LlamaMLP": 2,
        "LlamaRMSNorm": 5,
    }
    assert not report.left
    text = str(report)
    assert "2 x LlamaAttention: apply_rotary_, attention" in text
    assert "5 x LlamaRMSNorm" in text
    assert "padding" in text


def test_what_does_not_fit_is_left_by_name() -> None:
    left = {entry.module: entry.note for entry in accelerate(build("phi, grouped heads, q/k norm, exact GELU")).left}
    assert left == {"PhiDecoderLayer": "LayerNorm between projection and rotary embedding (qk_layernorm)"}
    left = {entry.module: entry.note for entry in accelerate(build("phi, wide heads")).left}
    assert left == {"PhiDecoderLayer": "4 heads of 32 in a width of 64"}
    left = {entry.module: entry.note for entry in accelerate(build("gpt-neox", hidden_act="relu")).left}
    assert left.keys() == {"GPTNeoXMLP"} and "ReLU" in left["GPTNeoXMLP"]
    model = build("phi")
    model.config._attn_implementation = "flex_attention"
    left = {entry.module: entry.note for entry in accelerate(model).left}
    assert left.keys() == {"PhiDecoderLayer", "PhiAttention"} and "'flex_attention'" in left["PhiAttention"]
    assert model.config._attn_implementation == "flex_attention"


def test_what_others_have_wrapped_is_left_by_name() -> None:
    model = build("llama", is_causal=False)
    assert {"LlamaAttention"} <= {entry.module for entry in accelerate(model).left if "is_causal" in entry.note}

    model = build("phi")  # as accelerate's device_map does
    attention_module = model.model.layers[0].self_attn
    theirs, called = attention_module.forward, []
    attention_module.forward = lambda *a, **k: called.append(1) or theirs(*a, **k)
    left = {entry.module: entry for entry in accelerate(model).left}
    assert left["PhiAttention"].count == 1 and "replaced on the instance" in left["PhiAttention"].note
    model(input_ids=tokens(), labels=tokens())
    assert called == [1]

    norm = model.model.final_layernorm  # as FSDP2 does
    norm.__class__ = type("FSDPLayerNorm", (type(norm),), {})
    with pytest.raises(ValueError, match="FSDPLayerNorm was made from an accelerated module's class"):
        restore(model)
    assert list(model(input_ids=tokens(), labels=tokens())) == ["loss"]  # nothing was half restored


@pytest.mark.parametrize("name", MODELS)
def test_restore_leaves_the_instance_as_it_was(name: str) -> None:
    model = build(name).eval()
    ids = tokens()
    before = model(input_ids=ids, labels=ids)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    implementation, config = model.config._attn_implementation, model.config.to_dict()
    state = {key: value.clone() for key, value in model.state_dict().items()}

    accelerate(model)
    names = [(cls.__module__, cls.__qualname__) for cls in classes]  # PEFT and save_pretrained record them
    assert [(type(module).__module__, type(module).__qualname__) for module in model.modules()] == names
    assert list(model.state_dict()) == list(state)
    assert model.config.to_dict() == config
    model(input_ids=ids, labels=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    restore(model.eval())

    model.zero_grad()
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.logits, after.logits)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_another_head_is_accelerated_without_the_loss() -> None:
    plain = build("phi", head="ForSequenceClassification")
    accelerated = copy.deepcopy(plain)
    assert "PhiDecoderLayer" in {entry.module for entry in accelerate(accelerated).replaced}
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    theirs, ours = gradients(plain, batch), gradients(accelerated, batch)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_attention_is_ours_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        replaced_attention, "attention", lambda q, *a, **k: seen.append(q.shape) or attention(q, *a, **k)
    )
    model = build("gpt-neox").eval()
    accelerate(model)
    model(input_ids=tokens(2, 9))
    assert seen == [(2, 9, 4, 16)] * 2
    seen.clear()
    model(input_ids=tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.int64))
    assert len(seen) == 2  # a mask that hides nothing
    seen.clear()
    batch = padded("left")
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert seen == []
    past = model(input_ids=tokens(2, 9), use_cache=True).past_key_values
    assert len(seen) == 2  # the prompt
    model(input_ids=tokens(2, 3), past_key_values=past)
    assert len(seen) == 2  # three more tokens


@pytest.mark.parametrize(
    ("name", "head_dim", "changes"),
    [
        *((name, 64, {}) for name in FAMILIES),
        ("phi", 64, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
        *((name, 80, {}) for name in FAMILIES),  # as in Phi-2 and Pythia-2.8B
        ("phi-3", 96, {}),
        *((name, 72, {}) for name in FAMILIES),
        ("llama, eager", 72, {}),
    ],
)
def test_triton_takes_the_heads_that_it_has(
    name: str, head_dim: int, changes: dict, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """As on a GPU, heads of other sizes run on the model's own attention, and the other ops still run."""
    triton_attention = importlib.import_module("phi_fast.kernels.triton.attention")
    forward, calls = triton_attention.forward, []
    monkeypatch.setattr(triton_attention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_hidden_layers": 1}
    if name == "gpt-j":
        sizes |= {"n_embd": 2 * head_dim, "n_head": 2, "n_layer": 1}
    if name == "qwen3":
        sizes |= {"head_dim": head_dim}
    plain = build(name, **sizes, **changes).to(device)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    batch = {key: x.to(device) for key, x in unpadded(1, 1, 7).items()}
    theirs = gradients(plain, batch)
    with use("triton"):
        ours = gradients(accelerated, batch)
    assert len(calls) == (head_dim != 72)
    for what in theirs:
        torch.testing.assert_close(ours[what], theirs[what], rtol=1e-3, atol=1e-5)


def test_dropout_takes_the_models_own_path() -> None:
    plain = build("phi", resid_pdrop=0.1, attention_dropout=0.1, embd_pdrop=0.1)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    ids = tokens()
    losses = []
    for model in (plain, accelerated):
        torch.manual_seed(5)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_of_the_users_own_is_kept() -> None:
    model = build("phi")
    accelerate(model)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    assert out.loss.item() == 42 and out.logits is not None


def test_a_hook_sees_its_module_called() -> None:
    model = build("phi")
    accelerate(model)
    called = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: called.append("q_proj"))
    model.lm_head.register_forward_hook(lambda *_: called.append("lm_head"))
    ids = tokens()
    assert model(input_ids=ids, labels=ids).logits is not None
    assert called == ["q_proj", "lm_head"]

    model = build("gpt-neox")
    accelerate(model)
    model.gpt_neox.layers[1].mlp.act.register_forward_hook(lambda *_: called.append("act"))
    model(input_ids=ids, labels=ids)
    assert called[2:] == ["act"]


@pytest.mark.parametrize("return_dict", [True, False])
def test_return_dict(return_dict: bool) -> None:
    model = build("phi")
    accelerate(model)
    ids = tokens()
    out = model(ids, labels=ids, return_dict=return_dict)
    assert torch.is_tensor(out.loss if return_dict else out[0])
    assert isinstance(out, tuple) is not return_dict


def test_unknown_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.modules\.linear\.Linear .* PhiForCausalLM, GPTNeoXForCausalLM"):
        accelerate(nn.Linear(2, 2))
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(TypeError, match="GPT2LMHeadModel is not a model that accelerate knows"):
        accelerate(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16)))


def test_twice_and_never() -> None:
    model = build("phi")
    with pytest.raises(ValueError, match="PhiForCausalLM is not accelerated"):
        restore(model)
    accelerate(model)
    with pytest.raises(ValueError, match=r"accelerated already; call restore\(model\) first"):
        accelerate(model)
    restore(model)
    accelerate(model)


def test_labels_outside_the_vocabulary_are_refused() -> None:
    model = build("phi")
    accelerate(model)
    ids = tokens()
    with pytest.raises(ValueError, match="expected 0 to 95"):
        model(input_ids=ids, labels=ids + 90)


def test_transformers_is_imported_when_accelerate_is_asked_for_and_named_where_it_is_missing() -> None:
    lines = (
        "import sys, phi_fast.kernels",
        "assert 'transformers' not in sys.modules",
        "sys.modules['transformers'] = None",
        "phi_fast.kernels.accelerate",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert "ImportError: accelerate and restore need transformers 5 or newer" in done.stderr

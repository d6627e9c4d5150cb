"""accelerate writes nothing into the user's config, and each call follows what the config says at that time."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers_models import FAMILIES, MODELS, build, padded, tokens

from phi_fast.kernels import accelerate, attention, restore
from phi_fast.kernels.transformers import attention as replaced_attention

SETTABLE = tuple(name for name in FAMILIES if name != "gpt-j")  # transformers' GPT-J has only one attention
EAGER = {"attn_implementation": "eager"}


def pair(name: str, **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the plain model, the accelerated model), each with its own config."""
    plain = build(name, **changes).eval()
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    return plain, accelerated


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one whenever a module other than phi's block calls this library's attention."""
    found: list[str] = []
    monkeypatch.setattr(replaced_attention, "attention", lambda *a, **k: found.append("ours") or attention(*a, **k))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_not_written_to(name: str) -> None:
    model = build(name)
    before, ids = copy.deepcopy(vars(model.config)), tokens()
    accelerate(model)
    assert vars(model.config) == before
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval().generate(ids, max_new_tokens=2)
    assert vars(model.config) == before
    restore(model)
    assert vars(model.config) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_share_a_config(name: str, calls: list[str]) -> None:
    first = build(name).eval()
    second, third = (type(first)(first.config).eval() for _ in range(2))
    assert first.config is second.config is third.config
    classes = [type(module) for module in second.modules()]
    report = accelerate(first)
    assert [type(module) for module in second.modules()] == classes
    assert accelerate(second) == report
    restore(first)
    ids = tokens()
    for model, count in ((first, 0), (second, 2), (third, 0)):
        model(ids, use_cache=True)  # with a cache, phi's block calls its attention module
        assert len(calls) == count
        calls.clear()


@pytest.mark.parametrize("name", FAMILIES)
def test_new_models_from_the_config_of_an_accelerated_one(name: str, tmp_path: Path) -> None:
    """The plain class, the accelerated class and transformers' factories all make a plain model."""
    model, ids = build(name).eval(), tokens()
    theirs, plain = model(ids).logits, type(model)
    accelerate(model)
    model.save_pretrained(tmp_path)
    for new in (
        plain(model.config),
        type(model)(model.config),
        type(model)(config=model.config),
        AutoModelForCausalLM.from_config(model.config),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config),
        type(model).from_pretrained(tmp_path),
    ):
        new.eval().load_state_dict(model.state_dict())
        assert type(new) is plain and torch.equal(new(ids).logits, theirs)
        accelerate(new)


@pytest.mark.parametrize("how", ["config", "argument"])
@pytest.mark.parametrize("name", FAMILIES)
def test_attentions_that_are_asked_for(name: str, how: str) -> None:
    models, ids = pair(name, **EAGER), tokens()
    for model in models:
        if how == "config":
            model.config.output_attentions = True
    asked = {"output_attentions": True} if how == "argument" else {}
    theirs, ours = (model(ids, **asked).attentions for model in models)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", SETTABLE)
def test_sdpa_and_eager_set_later(name: str, calls: list[str]) -> None:
    plain, accelerated = pair(name)
    batches = [{"input_ids": tokens(), "use_cache": True}, {k: x for k, x in padded("left").items() if k != "labels"}]
    for implementation in ("eager", "sdpa", "eager"):
        for model in (plain, accelerated):
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
        for batch, count in zip(batches, (2, 0), strict=True):
            calls.clear()
            assert_same(accelerated(**batch).logits, plain(**batch).logits)
            assert len(calls) == count
    theirs, ours = (model(tokens(), output_attentions=True).attentions for model in (plain, accelerated))
    assert len(ours) == len(theirs) == 2


@pytest.mark.parametrize("how", ["set_attn_implementation", "config"])
@pytest.mark.parametrize("as_sdpa", [False, True])
@pytest.mark.parametrize("name", SETTABLE)
def test_an_attention_of_the_users_own(
    name: str, as_sdpa: bool, how: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's attention runs, whether it has its own name or replaces sdpa."""
    own, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args: object, **kwargs: object) -> object:
        own.append("mine")
        return sdpa(*args, **kwargs)

    plain, accelerated = pair(name)
    key = "sdpa" if as_sdpa else "mine"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, key, mine)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, key, sdpa_mask)
    if how == "config":
        accelerated.config._attn_implementation = key
    else:
        accelerated.set_attn_implementation(key)
    ids = tokens()
    ours = accelerated(ids, use_cache=False).logits
    assert own == ["mine"] * 2 and calls == []
    assert_same(ours, plain(ids).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_assisted_decoding(name: str) -> None:
    plain, accelerated = pair(name)
    assistant = build(name, num_hidden_layers=1).eval()
    inputs = {"input_ids": tokens(1, 7), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = plain.generate(**inputs, **greedy)
    assert torch.equal(accelerated.generate(**inputs, **greedy, assistant_model=assistant), expected)
    accelerate(assistant)
    assert torch.equal(accelerated.generate(**inputs, **greedy, assistant_model=assistant), expected)


@pytest.mark.parametrize("name", SETTABLE)
def test_is_causal_set_later(name: str) -> None:
    models, ids = pair(name), tokens()
    causal = models[0](ids).logits
    for model in models:
        model.config.is_causal = False
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    theirs, ours = (model(ids).logits for model in models)
    assert not torch.allclose(theirs, causal, rtol=1e-2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 1}),
        ("mistral", {"sliding_window": 5}),
        ("phi-3", {"sliding_window": 5}),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_sliding_windows(name: str, changes: dict, implementation: str, calls: list[str]) -> None:
    """Rows shorter than the window, as long, one longer, and longer; each layer runs on the op, and gradients agree."""
    plain, accelerated = pair(name, attn_implementation=implementation, **changes)
    for length in (4, 5, 6, 17):
        ids = tokens(2, length)
        theirs, ours = (model(ids, labels=ids) for model in (plain, accelerated))
        assert len(calls) == plain.config.num_hidden_layers
        assert_same(ours.logits, theirs.logits)
        for output in (theirs, ours):
            output.loss.backward()
        for expected, found in zip(plain.parameters(), accelerated.parameters(), strict=True):
            assert_same(found.grad, expected.grad)
        plain.zero_grad()
        accelerated.zero_grad()
        calls.clear()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_what_else_sliding_masks_hide(name: str, implementation: str, calls: list[str]) -> None:
    """Padding and other documents leave the mask to the model; with a cache only the prompt runs on the op."""
    sliding = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
    changes = {key: value for key, value in sliding.items() if name == "qwen2" or key == "sliding_window"}
    plain, accelerated = pair(name, attn_implementation=implementation, **changes)
    ids = tokens(2, 12)
    padding = torch.ones(2, 12, dtype=torch.int64)
    padding[0, :5] = 0
    restarting = torch.cat((torch.arange(5), torch.arange(7)))[None]
    for asked in ({"attention_mask": padding}, {"position_ids": restarting, "use_cache": False}):
        assert_same(accelerated(ids, **asked).logits[:, 5:], plain(ids, **asked).logits[:, 5:])
    assert not calls
    greedy = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(accelerated.generate(ids, **greedy), plain.generate(ids, **greedy))
    assert len(calls) == plain.config.num_hidden_layers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_of_the_users_own(name: str, implementation: str) -> None:
    """The additive mask has four dims; here each position sees itself and the two before it."""
    plain, accelerated = pair(name, attn_implementation=implementation if name in SETTABLE else None)
    ids = tokens(2, 9)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    mask = torch.zeros(2, 1, 9, 9).masked_fill((distance < 0) | (distance > 2), torch.finfo(torch.float32).min)
    ours, theirs = (model(ids, attention_mask=mask).logits for model in (accelerated, plain))
    assert not torch.allclose(theirs, plain(ids).logits, rtol=1e-2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_else_eager_masks_hide(name: str) -> None:
    """Masks hide other documents (by positions), padding, and a static cache's room; a cache adds earlier tokens."""
    plain, accelerated = pair(name, **EAGER)
    ids, first = tokens(2, 12), tokens(2, 5, seed=2)
    restarting = torch.cat((torch.arange(5), torch.arange(7)))[None]
    padding = torch.ones(2, 12, dtype=torch.int64)
    padding[0, :5] = 0
    for asked in (
        {"position_ids": restarting, "use_cache": False},
        {"attention_mask": padding},
        {"attention_mask": padding.bool(), "position_ids": restarting},
    ):
        assert_same(accelerated(ids, **asked).logits[:, 5:], plain(ids, **asked).logits[:, 5:])
    for cache in (lambda: DynamicCache(config=plain.config), lambda: StaticCache(plain.config, max_cache_len=32)):
        found = []
        for model in (accelerated, plain):
            past = cache()
            model(first, past_key_values=past, use_cache=True)
            found.append(model(ids, past_key_values=past, use_cache=True).logits)
        assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*(name for name in FAMILIES if name != "phi"), "phi, wide heads"])
def test_eager_runs_on_the_op_when_it_is_computed_again_too(name: str, reentrant: bool, calls: list[str]) -> None:
    """Gradient checkpointing calls a layer again in the backward pass, with the mask that it had."""
    model = build(name, **EAGER)
    accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 4


def test_phis_block_leaves_another_attention_alone() -> None:
    class Nothing(torch.nn.Module):
        def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
            return torch.zeros_like(hidden_states), None

    models = pair("phi")
    for model in models:
        for layer in model.model.layers:
            layer.self_attn = Nothing()
    plain, accelerated = models
    assert_same(accelerated(tokens(), use_cache=False).logits, plain(tokens(), use_cache=False).logits)


def test_phis_block_runs_under_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("phi", **EAGER)
    accelerate(model)
    monkeypatch.setattr(transformers.models.phi.modeling_phi.PhiDecoderLayer, "forward", None)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_base_model_takes_positional_arguments(name: str) -> None:
    batch = padded("left")
    plain, accelerated = (model.base_model for model in pair(name, **EAGER))
    places = [batch["input_ids"], *(() if name != "gpt-j" else (None,)), batch["attention_mask"]]
    ours, theirs = (model(*places).last_hidden_state for model in (accelerated, plain))
    assert_same(ours, theirs)
    embedded = {"inputs_embeds": plain.get_input_embeddings()(batch["input_ids"])}
    assert_same(accelerated(**embedded).last_hidden_state, plain(**embedded).last_hidden_state)


def test_a_module_of_another_version_is_left_and_named():
    """GPT-J's attention has no table of its own in transformers 5.24."""
    model = build("gpt-j")
    for module in model.modules():
        if type(module).__name__ == "GPTJAttention":
            del module.embed_positions
    report = str(accelerate(model))
    assert "GPTJAttention" in report and "known are 5.23's modules" in report

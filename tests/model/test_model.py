"""Compares Phi with ReferencePhi and transformers' PhiForCausalLM: loss, every gradient, training, decoding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_reference import hugging_face
from torch import Tensor

from phi_fast import Phi, PhiConfig
from phi_fast.kernels import use
from phi_fast.model.cache import KeyValueCache
from phi_fast.model.merged import to_merged, to_split
from phi_fast.model.reference import ReferencePhi

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = PhiConfig.preset("phi-tiny").replace(
    vocab_size=384, hidden_size=128, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=48
)


def random_reference(config: PhiConfig = SMALL, seed: int = 0) -> ReferencePhi:
    """A model whose parameters are all random: zero biases would hide a missing bias."""
    model = ReferencePhi(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("layernorm.weight") else 0.0
        parameter.data = mean + 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(DEVICE)


def twin(reference: torch.nn.Module, config: PhiConfig = SMALL, recompute: str = "norm_gelu") -> Phi:
    model = Phi(config, recompute=recompute).to(next(reference.parameters()))
    model.load_state_dict(to_merged(reference.state_dict()))
    return model


def batch(config: PhiConfig = SMALL, rows: int = 2, length: int = 33, seed: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    return ids[:, :-1].to(DEVICE), labels.to(DEVICE)


def loss_and_gradients(model: torch.nn.Module, length: int = 33) -> dict[str, Tensor]:
    """Gradients in fp64, under Hugging Face's names."""
    ids, labels = batch(length=length)
    model.zero_grad()
    if isinstance(model, Phi | ReferencePhi):
        loss = model(ids, labels=labels).loss
    else:
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1).float(), labels.flatten())
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {"loss": loss.detach(), **(to_split(named) if isinstance(model, Phi) else named)}
    return {name: value.double() for name, value in found.items()}


def error(actual: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()


def test_float64_parity_is_to_the_last_digits():
    reference = random_reference().double()
    with use("reference"):
        actual = loss_and_gradients(twin(reference))
    expected = loss_and_gradients(reference)
    assert actual.keys() == expected.keys()
    assert max(error(actual[name], expected[name]) for name in expected) < 1e-12


def test_documents_are_isolated_in_both_models():
    """Compares two packed rows with each document alone, in fp64: logits, loss and every gradient.

    The last digits may differ: positions continue across a row's documents, and the angles of other positions, computed
    in fp32, round differently. Attention to a token of another document would change the loss by 1e-3.
    """
    reference = random_reference().double()
    ids, labels = batch(length=24)
    starts = [0, 7, 8, 24, 40, 48]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    found = {}
    with use("reference"):
        for name, model in (("reference", reference), ("phi", twin(reference))):
            model.zero_grad()
            loss = model(ids, labels, cu_seqlens=cu_seqlens).loss
            loss.backward()
            named = {key: parameter.grad for key, parameter in model.named_parameters()}
            found[name] = {"loss": loss.detach(), **(to_split(named) if isinstance(model, Phi) else named)}
        logits = twin(reference)(ids, cu_seqlens=cu_seqlens).logits.flatten(0, 1)
        alone = [reference(ids.flatten()[a:b][None]).logits[0] for a, b in itertools.pairwise(starts)]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-6)
    expected = F.cross_entropy(torch.cat(alone), labels.flatten())
    assert found["phi"]["loss"].item() == pytest.approx(expected.item(), rel=1e-8)
    for name, value in found["reference"].items():
        assert error(found["phi"][name], value) < 1e-6, name


@pytest.mark.parametrize(("backend", "length"), [("auto", 33), ("triton", 7)])  # the interpreter is slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_every_gradient_err_no_more_than_plain_pytorch(backend, length, dtype):
    reference = random_reference()
    exact = loss_and_gradients(reference.double(), length)
    expected = loss_and_gradients(reference.to(dtype), length)
    with use(backend):
        actual = loss_and_gradients(twin(reference), length)
    rounding = torch.finfo(dtype).eps * exact["loss"]
    assert abs(actual["loss"] - exact["loss"]) <= 2 * max(abs(expected["loss"] - exact["loss"]), rounding)
    for name in exact.keys() - {"loss"}:
        assert error(actual[name], exact[name]) <= 2 * error(expected[name], exact[name]), name


@pytest.mark.parametrize("recompute", ["none", "norm_gelu", "all"])
def test_parity_with_transformers(recompute):
    theirs = hugging_face(SMALL).to(DEVICE)
    ours = twin(theirs, recompute=recompute)
    expected, actual = loss_and_gradients(theirs), loss_and_gradients(ours)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert error(actual[name], expected[name]) < 1e-5, name
    ids, labels = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert ours(ids, labels=labels).logits is None
    assert {name: p.shape for name, p in to_split(ours.state_dict()).items()} == {
        name: p.shape for name, p in theirs.state_dict().items()
    }


def train(model: torch.nn.Module, config: PhiConfig, steps: int, length: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.1)
    losses = []
    for step in range(steps):
        # Repeats four batches, so that the loss falls: a falling loss shows more than a constant one.
        ids, labels = batch(config, rows=1, length=length, seed=step % 4)
        loss = model(ids, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def follow(config: PhiConfig, steps: int, length: int) -> None:
    torch.manual_seed(0)
    reference = ReferencePhi(config).to(DEVICE)
    model = twin(reference, config)
    expected = train(reference, config, steps, length)
    with use("triton"):
        actual = train(model, config, steps, length)
    assert expected[-1] < expected[0] - 0.05
    assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) < 1e-3


def test_triton_follows_the_reference():
    follow(SMALL.replace(hidden_size=64, num_attention_heads=1, vocab_size=96), steps=5, length=6)


@pytest.mark.slow
def test_triton_follows_the_reference_for_50_steps_of_phi_tiny():
    follow(PhiConfig.preset("phi-tiny"), steps=50, length=8)


@pytest.mark.parametrize("recompute", ["none", "norm_gelu", "all"])
def test_compiled_whole_without_a_break(recompute):
    model = twin(random_reference(), recompute=recompute)
    expected = loss_and_gradients(model)
    model.zero_grad()
    ids, labels = batch()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=labels).loss
    loss.backward()
    named = to_split({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in {"loss": loss, **named}.items():
        assert error(value.double(), expected[name]) < 1e-6, name


def test_decoding_by_parts_gives_the_logits_of_the_whole():
    model = twin(random_reference())
    ids, _ = batch(length=20)
    with torch.no_grad():
        expected = model(ids).logits
    cache = KeyValueCache.allocate(model, batch=2, max_length=20)
    parts = [model.decode(part, cache, all_logits=True) for part in ids.split([7, 1, 4, 1, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
    cache = KeyValueCache.allocate(model, batch=2, max_length=20)
    torch.testing.assert_close(model.decode(ids, cache), expected[:, -1], atol=1e-4, rtol=1e-4)
    assert not model.decode(ids[:, :0], KeyValueCache.allocate(model, 2, 1), all_logits=True).numel()


def test_decoding_rows_of_different_lengths():
    """With padding on the left, each row has the same logits as alone."""
    model = twin(random_reference())
    ids, _ = batch(length=12)
    padding = torch.tensor([0, 5], device=DEVICE)
    padded = ids.clone()
    padded[1, 5:] = ids[1, :7]
    cache = KeyValueCache.allocate(model, batch=2, max_length=12, first=padding)
    first = model.decode(padded[:, :10], cache)
    then = model.decode(padded[:, 10:11], cache)
    with torch.no_grad():
        alone = [model(ids[:1]).logits[0, [9, 10]], model(ids[1:, :7]).logits[0, [4, 5]]]
    torch.testing.assert_close(torch.stack((first, then), 1), torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_the_rotary_table_stays_wide():
    model = Phi(SMALL).half()
    assert model.lm_head.weight.dtype == torch.float16
    assert model.cos.dtype == model.sin.dtype == torch.float32
    assert torch.equal(model.cos, Phi(SMALL).cos)
    assert Phi(SMALL).to("meta").cos.is_meta
    assert not {"cos", "sin"} & model.state_dict().keys()


def test_initialisation_and_size():
    torch.manual_seed(0)
    model = Phi(SMALL)
    assert sum(p.numel() for p in model.parameters()) == SMALL.num_parameters()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif parameter.dim() == 1:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3, name


def test_bad_input_is_named():
    model = Phi(SMALL)
    with pytest.raises(ValueError, match="recompute='some'; expected one of"):
        Phi(SMALL, recompute="some")
    with pytest.raises(ValueError, match=r"input_ids \(1, 49\): expected .* at most 48 tokens"):
        model(torch.zeros(1, 49, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input_ids \(4,\)"):
        model(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels\[2\]=384"):
        model(torch.zeros(1, 3, dtype=torch.int64), labels=torch.tensor([[0, -100, 384]]))
    with pytest.raises(ValueError, match="max_length=49 exceeds the model's context of 48"):
        KeyValueCache.allocate(model, 1, 49)
    cache = KeyValueCache.allocate(model, 1, 4)
    with pytest.raises(ValueError, match=r"input_ids \(1, 5\): the cache holds a batch of 1 and has room for 4"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64), cache)


def test_state_dicts_convert_both_ways_and_refuse_what_is_not_phi():
    split = random_reference().state_dict()
    again = to_split(to_merged({**split, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    assert again.keys() == split.keys()
    assert all(torch.equal(again[name], split[name]) for name in split)
    with pytest.raises(KeyError, match=r"keys that phi does not have: model\.norm\.weight"):
        to_merged({**split, "model.norm.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"has no 'model.layers.1.mlp.fc2.bias'"):
        to_merged({name: tensor for name, tensor in split.items() if name != "model.layers.1.mlp.fc2.bias"})


def kept_bytes(model: torch.nn.Module) -> int:
    """Bytes of the storages that autograd keeps for backward, each counted once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # otherwise an address could be reused

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(model(batch()[0]).logits)
    return sum(kept.values())


def test_bytes_kept_by_a_layer_beside_transformers():
    """Activations per layer in fp32, in units of d numbers per token, including x: two layers' minus one layer's.

    transformers 5.23 (sdpa)    27.0
    Phi, recompute="none"       14.0
    Phi, recompute="norm_gelu"   9.0
    Phi, recompute="all"         1.0
    """

    def a_layer(build) -> float:
        one, two = (kept_bytes(build(SMALL.replace(num_hidden_layers=n)).to(DEVICE)) for n in (1, 2))
        return (two - one) / (2 * 33 * SMALL.hidden_size * 4)

    measured = {
        level: a_layer(lambda config, level=level: Phi(config, recompute=level))
        for level in ("none", "norm_gelu", "all")
    }
    measured["transformers"] = a_layer(hugging_face)
    assert measured["all"] == 1
    assert 9 < measured["norm_gelu"] < 9.1
    assert 14 < measured["none"] < 14.1
    assert measured["transformers"] > 27


@pytest.mark.parametrize("z", [0.0, 0.01])
def test_the_z_loss_is_added_in_training_alone(z: float) -> None:
    """Against the definition in float64: cross entropy + z · mean of log²(sum of exp(logits)), and its gradients."""
    wide = random_reference().double()
    ids, labels = batch()
    logits = wide(ids).logits[labels != -100]
    entropy = F.cross_entropy(logits, labels[labels != -100])
    expected = entropy + z * logits.logsumexp(-1).square().mean()
    expected.backward()
    reference = ReferencePhi(SMALL, z_loss=z).to(DEVICE)
    reference.load_state_dict(wide.state_dict())
    phi = Phi(SMALL, z_loss=z).to(DEVICE)
    phi.load_state_dict(to_merged(reference.state_dict()))
    for model in (reference, phi):
        loss = model(ids, labels).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()
        assert float(model.eval()(ids, labels).loss) == pytest.approx(float(entropy), rel=1e-6)
    found = {"reference": reference.lm_head.weight.grad, "phi": phi.lm_head.weight.grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wide.lm_head.weight.grad, rtol=1e-4, atol=1e-7, msg=name)

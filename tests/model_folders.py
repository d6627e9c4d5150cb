"""Small models in memory, their folders in every layout, and a run directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phi_fast.config import PhiConfig
from phi_fast.conversion import published_layouts
from phi_fast.conversion.hf_config import old_config, phi_config
from phi_fast.model import Phi
from phi_fast.model.merged import to_merged

CONFIG = PhiConfig(
    vocab_size=320,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
)


def random_weights(dtype=torch.float32, config=CONFIG, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: (torch.randn(s, generator=generator) * 0.02).to(dtype) for n, s in published_layouts.shapes(config).items()
    }


def speaking_phi() -> Phi:
    """A small random model whose greedy texts differ from each other: its weights are larger than usual."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "max_position_embeddings": 96, "initializer_range": 0.2}
    return Phi(dataclasses.replace(CONFIG, **shape)).eval()


def random_prompts(count: int = 20) -> list[list[int]]:
    """Prompts of 1 to 59 byte tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths]


def old_weights(hf: dict[str, torch.Tensor], *, mixformer: bool) -> dict[str, torch.Tensor]:
    """The older layouts by their published key maps, written out here independently of the code under test."""
    last = CONFIG.num_hidden_layers + 1
    embedding, head = ("layers.0.wte", f"layers.{last}") if mixformer else ("transformer.embd.wte", "lm_head")
    state = {f"{embedding}.weight": hf["model.embed_tokens.weight"]}
    for i in range(CONFIG.num_hidden_layers):
        ours, theirs = (f"layers.{i + 1}" if mixformer else f"transformer.h.{i}"), f"model.layers.{i}"
        for p in ("weight", "bias"):
            state[f"{ours}.ln.{p}"] = hf[f"{theirs}.input_layernorm.{p}"]
            state[f"{ours}.mixer.Wqkv.{p}"] = torch.cat([hf[f"{theirs}.self_attn.{x}_proj.{p}"] for x in "qkv"])
            state[f"{ours}.mixer.out_proj.{p}"] = hf[f"{theirs}.self_attn.dense.{p}"]
            state[f"{ours}.mlp.fc1.{p}"] = hf[f"{theirs}.mlp.fc1.{p}"]
            state[f"{ours}.mlp.fc2.{p}"] = hf[f"{theirs}.mlp.fc2.{p}"]
        state[f"{ours}.mixer.rotary_emb.inv_freq"] = torch.ones(16)
    for p in ("weight", "bias"):
        state[f"{head}.ln.{p}"] = hf[f"model.final_layernorm.{p}"]
        state[f"{head}.linear.{p}"] = hf[f"lm_head.{p}"]
    return state


def tiny_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def make_source(folder: Path, name: str, hf: dict[str, torch.Tensor], *, torch_file: bool = False) -> Path:
    folder.mkdir(parents=True)
    dtype = next(iter(hf.values())).dtype
    if name == "hf":
        state, config = hf, phi_config(CONFIG, dtype)
    elif name == "merged":
        state, config = to_merged(hf), phi_config(CONFIG, dtype)
    else:
        mixformer = name == "mixformer"
        state, config = old_weights(hf, mixformer=mixformer), old_config(CONFIG, dtype, mixformer=mixformer)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    if torch_file:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder


def make_run(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    checkpoint = folder / "checkpoints" / "step-7"
    checkpoint.mkdir(parents=True)
    save_file(weights, checkpoint / "model.safetensors")
    options = {"recipe": "tiny", "lr": 2e-4, "model": CONFIG.to_dict()}
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "options": options}))
    (folder / "config.json").write_text(json.dumps(options))
    (folder / "checkpoints" / "latest").write_text("step-7")
    (folder / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 3.5, "val_loss": 3.25}\n{"step": 7, "loss": 3.0}\n{"step"'
    )
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder

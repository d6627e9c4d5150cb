"""The model's shape, with Hugging Face's field names."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

MAX_CONTEXT = 2**20
"""Limit of max_position_embeddings, in tokens: no weight has this length, but tables and caches do."""


@dataclass(frozen=True)
class PhiConfig:
    """Shape of a phi model. The defaults are phi-1.5 (arXiv 2309.05463, and `microsoft/phi-1_5`'s config.json)."""

    vocab_size: int = 51200
    """Rows of the embedding and of lm_head. 51200 includes padding: phi's tokenizer has 50295 ids."""
    hidden_size: int = 2048
    """Width d of the residual stream; num_attention_heads × 64."""
    num_hidden_layers: int = 24
    """Number of parallel blocks."""
    num_attention_heads: int = 32
    """Attention heads of dimension 64; phi-1.5 has no grouped-query attention."""
    max_position_embeddings: int = 2048
    """Context length: the longest sequence, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    layer_norm_eps: float = 1e-5
    """Epsilon under the square root in every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of every Linear and Embedding weight at initialisation; biases start at 0."""
    bos_token_id: int | None = 50256
    """Token id that begins a text: `<|endoftext|>` (transformers' own PhiConfig defaults to 1). None: the tokenizer's
    id, if it has one."""
    eos_token_id: int | None = 50256
    """Token id that ends a text: `<|endoftext|>` (transformers' own PhiConfig defaults to 2). None: the tokenizer's id,
    if it has one."""

    def __post_init__(self) -> None:
        if self.hidden_size != 64 * self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not num_attention_heads={self.num_attention_heads} × head dim 64; "
                f"set hidden_size={64 * self.num_attention_heads}"
            )
        for field in ("vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.max_position_embeddings > MAX_CONTEXT:
            raise ValueError(f"max_position_embeddings={self.max_position_embeddings}: must be at most {MAX_CONTEXT}")
        for field in ("rope_theta", "layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}: must be greater than 0, and finite")

    @property
    def head_dim(self) -> int:
        """Dimension of a head: 64 in every phi of this family."""
        return 64

    @property
    def rotary_dim(self) -> int:
        """Number of leading dims of each head that are rotated: half of them. The others pass through."""
        return 32

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP: 4d."""
        return 4 * self.hidden_size

    @staticmethod
    def preset(name: str) -> PhiConfig:
        """Return the shape of `"phi-1.5"`, `"phi-small"` or `"phi-tiny"`. Raises ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(map(repr, PRESETS))}")
        return PRESETS[name]

    def replace(self, **changes: Any) -> PhiConfig:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def num_parameters(self) -> int:
        """Count all parameters: embedding, blocks, final LayerNorm, lm_head with its bias."""
        d, block = self.hidden_size, 12 * self.hidden_size**2 + (3 + 1 + 4 + 1 + 2) * self.hidden_size
        return self.num_hidden_layers * block + 2 * d + 2 * self.vocab_size * d + self.vocab_size

    def matmul_parameters(self) -> int:
        """Count N of the 6N rule: weights used in a matrix product (no embedding, bias or LayerNorm)."""
        return self.num_hidden_layers * 12 * self.hidden_size**2 + self.vocab_size * self.hidden_size

    def flops_per_token(self, sequence_length: int, *, causal: bool) -> int:
        """Count forward and backward FLOPs per token: 6N, plus attention's two products.

        causal: count half of attention's products, those on or below the diagonal; otherwise all of them.
        """
        attention = 12 * self.num_hidden_layers * self.hidden_size * sequence_length
        return 6 * self.matmul_parameters() + (attention // 2 if causal else attention)


PRESETS = {
    "phi-1.5": PhiConfig(),
    "phi-small": PhiConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=512),
    "phi-tiny": PhiConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "fc1", "dense", "fc2")
"""The projections that can have adapters, by their names in transformers' phi, as PEFT's `target_modules` has them."""


@dataclass(frozen=True)
class LoraConfig:
    """Shape of a model's low-rank adapters (LoRA: Hu et al., arXiv 2106.09685): x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names from `LORA_TARGETS`."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, config: PhiConfig) -> None:
        """Raise ValueError, naming the option, for adapters that a model of this shape cannot have."""
        if not 1 <= self.rank <= config.hidden_size:
            raise ValueError(
                f"lora_rank={self.rank}: must be at least 1, and at most the model's width of {config.hidden_size}"
            )
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora_alpha={self.alpha}: must be greater than 0, and finite")
        for target in self.targets:
            if target not in LORA_TARGETS:
                near = difflib.get_close_matches(target, LORA_TARGETS, 1)
                way_out = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(LORA_TARGETS)}"
                raise ValueError(f"lora_targets: {target!r} is no projection of phi; {way_out}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora_targets={','.join(self.targets)}: name at least one projection, and each once")

    def shapes(self, config: PhiConfig) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """Shapes of A (rank, inputs) and B (outputs, rank) of each target, in the order of `LORA_TARGETS`."""
        d, inner = config.hidden_size, config.intermediate_size
        inputs, outputs = {"fc2": inner}, {"fc1": inner}
        ordered = (target for target in LORA_TARGETS if target in self.targets)
        return {t: ((self.rank, inputs.get(t, d)), (outputs.get(t, d), self.rank)) for t in ordered}

    def num_parameters(self, config: PhiConfig) -> int:
        """Number of elements of all adapters of a model."""
        pairs = self.shapes(config).values()
        return config.num_hidden_layers * sum(rows * columns for pair in pairs for rows, columns in pair)

"""phi in plain PyTorch, to be read beside the paper: separate q, k and v, no kernels, no tricks.

Everything else in this project is tested against this file. Module names are Hugging Face's, so that a state dict of
`transformers.PhiForCausalLM` loads unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PhiConfig
from .output import Output


def rotary_cos_sin(config: PhiConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, each (length, rotary_dim / 2): RoFormer (arXiv 2104.09864), eq. 34.

    The angles are computed in fp32 for any `dtype` but fp64 (fp64 there): a bf16 angle at position 2047 is off by
    radians.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
    frequency = 1.0 / config.rope_theta**exponent
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).to(wide)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of every head by the token's position; the other dims stay as they are.

    x: (batch, heads, sequence, head_dim). Dim i pairs with dim i + rotary_dim/2 (the half-split, "NeoX" order).
    """
    half = cos.shape[-1]
    x1, x2, through = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, through), dim=-1)


def within_documents(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Bool (batch, 1, length, length): True where a token attends to itself or an earlier token of its document."""
    tokens = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, tokens, right=True).view(batch, length)
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril())[:, None]


class Attention(nn.Module):
    """Multi-head causal attention with partial rotary embeddings; every projection has a bias."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.dense = nn.Linear(d, d)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None) -> Tensor:
        batch, length, d = h.shape
        heads = (batch, length, self.config.num_attention_heads, self.config.head_dim)
        q, k, v = (proj(h).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.dense(o.transpose(1, 2).reshape(batch, length, d))


class MLP(nn.Module):
    """fc2(gelu(fc1(h))), GELU in its tanh form ("gelu_new")."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class ParallelBlock(nn.Module):
    """x + attention(h) + mlp(h) with one h = LayerNorm(x): both branches read the same normalised input."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None) -> Tensor:
        h = self.input_layernorm(x)
        return self.self_attn(h, cos, sin, visible) + self.mlp(h) + x


class Decoder(nn.Module):
    """Embedding, blocks, final LayerNorm."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ParallelBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)
        cos, sin = rotary_cos_sin(self.config, input_ids.shape[1], x.device, x.dtype)
        visible = None if cu_seqlens is None else within_documents(cu_seqlens, *input_ids.shape)
        for layer in self.layers:
            x = layer(x, cos, sin, visible)
        return self.final_layernorm(x)


class ReferencePhi(nn.Module):
    """The same model as `transformers.PhiForCausalLM`, without transformers.

    z_loss: factor of the auxiliary loss, the mean of log²(sum of exp(logits)), which is added in training mode.
    """

    def __init__(self, config: PhiConfig, *, z_loss: float = 0.0) -> None:
        super().__init__()
        self.config, self.z_loss = config, z_loss
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)  # with a bias, and not tied to the embedding
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Output:
        """Logits, and with `labels` the loss: the mean over the labels, or with reduction "sum" their sum.

        input_ids, labels: (batch, sequence) int64; labels[t] is the token after input_ids[t], -100 is left out.
        cu_seqlens (documents + 1,) int32: where documents begin in the rows joined end to end; no token attends to
        another document.
        """
        logits = self.lm_head(self.model(input_ids, cu_seqlens))
        loss = None
        if labels is not None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            rows, targets = logits.flatten(0, 1).to(wide), labels.flatten()
            loss = F.cross_entropy(rows, targets, reduction=reduction)
            if self.z_loss and self.training:
                squares = rows[targets != -100].logsumexp(-1).square()
                loss = loss + self.z_loss * (squares.sum() if reduction == "sum" else squares.mean())
        return Output(loss, logits)

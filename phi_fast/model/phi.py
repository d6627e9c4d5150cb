"""phi on the kernels: merged parameters, one autograd function per block, and no logits when a loss is computed.

`reference.ReferencePhi` is the same model in plain PyTorch; `merged` converts between their state dicts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PhiConfig
from ..kernels import apply_rotary_, bias_gelu, layer_norm, linear_cross_entropy, parallel_block, rotary_table
from ..kernels.parallel_block import RECOMPUTE
from .cache import KeyValueCache
from .lora import LoRA
from .output import Output


class Norm(nn.Module):
    """LayerNorm by the kernels."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class OutProjection(nn.Module):
    """[dense | fc2] as one matrix. The biases stay separate: every phi checkpoint has both."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.weight = nn.Parameter(torch.empty(d, d + config.intermediate_size))
        self.bias_attention = nn.Parameter(torch.zeros(d))
        self.bias_mlp = nn.Parameter(torch.zeros(d))

    def forward(self, mixed: Tensor) -> Tensor:
        return F.linear(mixed, self.weight, self.bias_attention + self.bias_mlp)


class Block(nn.Module):
    """x + attention(h) + mlp(h), h = LayerNorm(x)."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = Norm(config)
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size + config.intermediate_size)
        self.out_proj = OutProjection(config)
        self.lora: LoRA | None = None
        """Adapters, see `lora.add_lora`."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, recompute: str, cu_seqlens: Tensor | None = None) -> Tensor:
        return parallel_block(
            x,
            self.norm.weight,
            self.norm.bias,
            self.in_proj.weight,
            self.in_proj.bias,
            self.out_proj.weight,
            self.out_proj.bias_attention,
            self.out_proj.bias_mlp,
            cos,
            sin,
            num_heads=self.config.num_attention_heads,
            eps=self.norm.eps,
            recompute=recompute,
            cu_seqlens=cu_seqlens,
            adapters=None if self.lora is None else self.lora.tensors(),
        )

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache, layer: int) -> Tensor:
        """Apply the block to new tokens x (batch, new, d), and add their keys and values to the cache's `layer`."""
        d, heads = self.config.hidden_size, self.config.num_attention_heads
        h = self.norm(x)
        packed = self.in_proj(h)  # (batch, new, 7d)
        adapters = None if self.lora is None else self.lora.tensors()
        if adapters:
            adapters.add_to_packed_(packed.flatten(0, 1), h.flatten(0, 1))
        rotating = packed[..., : 2 * d].unflatten(-1, (2 * heads, -1))
        apply_rotary_(rotating, None, cos, sin, offset=cache.length)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in packed[..., : 3 * d].split(d, -1))
        o = cache.attend(layer, q, k, v)
        mixed = torch.cat((o.flatten(2), bias_gelu(packed[..., 3 * d :])), -1)
        out = self.out_proj(mixed)
        if adapters:
            adapters.add_to_output_(out.flatten(0, 1), mixed.flatten(0, 1))
        return x + out


class Phi(nn.Module):
    """phi on the kernels, for training and generation.

    recompute: what each block's backward recomputes instead of keeping it from the forward; see
    `kernels.parallel_block`. z_loss: factor of the auxiliary loss that is added in training mode; see
    `kernels.linear_cross_entropy`.

    Parameters, with d = hidden_size and V = vocab_size: embed_tokens.weight (V, d); layers.{i}.norm.weight and .bias
    (d), in_proj.weight (7d, d) with rows q, k, v, fc1 and in_proj.bias (7d), out_proj.weight (d, 5d) with columns
    dense, fc2, out_proj.bias_attention and out_proj.bias_mlp (d); final_norm.weight and .bias (d); lm_head.weight (V,
    d), lm_head.bias; with adapters (`lora.add_lora`) also layers.{i}.lora.adapters.{target}.a and .b. All have one
    dtype (`.half()`, `.bfloat16()`); the rotary table stays fp32. Autocast has no effect: convert the model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: PhiConfig, *, recompute: str = "norm_gelu", z_loss: float = 0.0) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r}; expected one of {', '.join(map(repr, RECOMPUTE))}")
        self.config, self.recompute, self.z_loss = config, recompute, z_loss
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_norm = Norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._make_rotary_table()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise weights from N(0, initializer_range), biases to 0, LayerNorm to 1 and 0; no scaling by depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.initializer_range)

    def _apply(self, fn, recurse=True):
        """Implement `.to`, `.half`, `.cuda` …: the rotary table moves to the new device and stays in fp32."""
        super()._apply(fn, recurse)
        self._make_rotary_table()
        return self

    def _make_rotary_table(self, length: int | None = None) -> None:
        weight, config = self.lm_head.weight, self.config
        length = length or config.max_position_embeddings
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.cos, self.sin = rotary_table(length, config.rotary_dim, config.rope_theta, weight.device, wide)

    def _rotary_table_for(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for `length` positions, which may exceed the context: attention sees only their differences."""
        if length > self.cos.shape[0]:
            self._make_rotary_table(length)
        return self.cos, self.sin

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        loss_scale: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Output:
        """Loss with `labels`, logits without.

        input_ids, labels: (batch, sequence) int64; labels[t] is the token after input_ids[t], -100 is left out. With
        labels: `.loss`, the mean over the labels that are not left out, or with reduction "sum" their sum, a scalar in
        fp32 (fp64 for an fp64 model), and `.logits` is None. Without: `.logits` (batch, sequence, vocab_size).
        loss_scale: see `kernels.linear_cross_entropy`; fp16 does not need one. cu_seqlens (documents + 1,) int32, from
        `data.Batch`: where documents begin in the rows joined end to end, and the end of the last row; no token attends
        to another document. Raises ValueError for a shape that does not fit.
        """
        batch_and_length = tuple(input_ids.shape)
        if len(batch_and_length) != 2 or batch_and_length[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids {batch_and_length}: expected (batch, sequence) with a sequence of at most "
                f"{self.config.max_position_embeddings} tokens"
            )
        x = self.embed_tokens(input_ids)
        cos, sin = self.cos, self.sin
        if cu_seqlens is not None:  # the rows are joined into one, and rotary positions run over its whole length
            x = x.view(1, -1, x.shape[-1])
            cos, sin = self._rotary_table_for(x.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin, self.recompute, cu_seqlens)
        x = self.final_norm(x).view(*batch_and_length, -1)
        if labels is None:
            return Output(None, self.lm_head(x))
        z_loss, head = self.z_loss if self.training else 0.0, self.lm_head
        options = {"z_loss": z_loss, "loss_scale": loss_scale, "reduction": reduction}
        return Output(linear_cross_entropy(x, head.weight, head.bias, labels, **options), None)

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KeyValueCache, *, all_logits: bool = False) -> Tensor:
        """Read new tokens after those in the cache, and add their keys and values to it.

        input_ids (batch, new) int64: the whole prompt at first, then one or more columns per call. Returns the logits
        after the last column, (batch, vocab_size), or with `all_logits` after each, (batch, new, vocab_size).
        Rows of different lengths: pad with `cache.pad_left`, and pass `first` to `KeyValueCache.allocate`.
        Raises ValueError if the cache has no room left or another batch size.

            cache = KeyValueCache.allocate(model, batch=1, max_length=prompt.shape[1] + 100)
            logits = model.decode(prompt, cache)
            while wanted: logits = model.decode(sample(logits)[:, None], cache)
        """
        x = self.decode_hidden(input_ids, cache)
        return self.lm_head(self.final_norm(x if all_logits else x[:, -1]))

    @torch.no_grad()
    def decode_hidden(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """`decode` without the final norm and the head: (batch, new, hidden_size)."""
        batch, new = input_ids.shape
        room = cache.k.shape[2] - cache.length
        if batch != cache.k.shape[1] or new > room:
            raise ValueError(
                f"input_ids {(batch, new)}: the cache holds a batch of {cache.k.shape[1]} and has room for {room} "
                "more tokens"
            )
        x = self.embed_tokens(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer.decode(x, self.cos, self.sin, cache, i)  # type: ignore[operator]
        cache.length += new
        return x

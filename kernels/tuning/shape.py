"""The sizes of a model and of its micro-batch, for which kernels are tuned."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and those of its micro-batch; phi-1.5's by default."""

    rows: int = 4
    """Rows per micro-batch."""
    sequence: int = 2048
    """Tokens per row."""
    hidden_size: int = 2048
    layers: int = 24
    heads: int = 32
    """Query heads."""
    key_heads: int = 0
    """Key heads; 0: as many as query heads."""
    intermediate_size: int = 8192
    gated: bool = False
    """The MLP is gated, as Llama's: `gated_activation` runs in place of `bias_gelu`."""
    vocabulary: int = 51200
    rotary_dim: int = 32
    """Dims of each head that RoPE rotates."""
    rotary_inside: bool = False
    """Attention rotates q and k while it reads them (`fuse_rotary`)."""
    documents: int = 0
    """Documents of one row, joined end to end; 0: rows are not divided."""
    causal: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def check(self) -> None:
        """Raises ValueError, naming the field, its value and what was expected."""
        optional = ("key_heads", "documents", "rotary_dim")
        for name in (each.name for each in fields(Shape)):
            value = getattr(self, name)
            if not isinstance(value, bool) and value < (0 if name in optional else 1):
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
        if self.hidden_size % self.heads:
            raise ValueError(f"--hidden-size {self.hidden_size} is not a multiple of --heads {self.heads}")
        if self.heads % (self.key_heads or self.heads):
            raise ValueError(f"--heads {self.heads} is not a multiple of --key-heads {self.key_heads}")
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"--rotary-dim {self.rotary_dim}: expected an even number of up to {self.head_dim}")
        if self.documents > self.tokens:
            raise ValueError(f"--documents {self.documents}: expected at most one per token, {self.tokens}")

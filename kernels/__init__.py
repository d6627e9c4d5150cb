"""Kernels that drop into other models: each op in Triton, in C++ for CPUs, and in plain PyTorch."""

# In the repository's root `import kernels` finds this folder, and transformers imports Hugging Face's package of that
# name to see its version. It must find an empty module: a second import would register every library op anew, and free
# the schemas that phi_fast.kernels' own ops point to.
if __name__ != "kernels":
    from .attention import attention
    from .backend import BackendUnavailable, fuse_rotary, in_use, keep_logits_on_chip, use
    from .bias_gelu import bias_gelu
    from .fused_adam import FusedAdam
    from .gated_activation import gated_activation
    from .layer_norm import layer_norm
    from .linear_cross_entropy import linear_cross_entropy
    from .memory import keep_freed_memory
    from .parallel_block import parallel_block
    from .rms_norm import rms_norm
    from .rotary import apply_rotary_, rotary_table

    def __getattr__(name: str) -> object:
        """`accelerate` and `restore`, on first use: they import transformers."""
        if name not in ("accelerate", "restore"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import transformers

        return getattr(transformers, name)

    __all__ = [
        "BackendUnavailable",
        "FusedAdam",
        "accelerate",
        "apply_rotary_",
        "attention",
        "bias_gelu",
        "fuse_rotary",
        "gated_activation",
        "in_use",
        "keep_freed_memory",
        "keep_logits_on_chip",
        "layer_norm",
        "linear_cross_entropy",
        "parallel_block",
        "restore",
        "rms_norm",
        "rotary_table",
        "use",
    ]

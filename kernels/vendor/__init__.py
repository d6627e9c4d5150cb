"""Other libraries' versions of an op, by name: torch's SDPA, flash-attn, NVIDIA apex. None is required."""

"""PhiConfig: the presets have the sizes of the paper and the design."""

from __future__ import annotations

import pytest
import torch

from phi_fast import PhiConfig
from phi_fast.model.reference import ReferencePhi


@pytest.mark.parametrize("preset", ["phi-1.5", "phi-small", "phi-tiny"])
def test_parameter_count_is_the_models(preset: str) -> None:
    config = PhiConfig.preset(preset)
    with torch.device("meta"):
        model = ReferencePhi(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


def test_phi_1_5_is_the_papers() -> None:
    config = PhiConfig.preset("phi-1.5")
    assert config.num_parameters() == 1_418_270_720
    assert config.matmul_parameters() == 1_312_817_152
    assert config.intermediate_size == 8192
    assert (config.bos_token_id, config.eos_token_id) == (50256, 50256)
    assert round(config.flops_per_token(2048, causal=False) / 1e9, 3) == 9.085
    assert round(config.flops_per_token(2048, causal=True) / 1e9, 3) == 8.481


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden_size=2050 is not num_attention_heads=32 × head dim 64"):
        PhiConfig(hidden_size=2050)
    with pytest.raises(ValueError, match="vocab_size=0"):
        PhiConfig(vocab_size=0)
    with pytest.raises(ValueError, match="num_attention_heads=0: must be at least 1"):
        PhiConfig(hidden_size=0, num_attention_heads=0)
    with pytest.raises(ValueError, match="max_position_embeddings=1048577: must be at most 1048576"):
        PhiConfig(max_position_embeddings=2**20 + 1)
    for field, value in (("rope_theta", 0.0), ("layer_norm_eps", -1.0), ("initializer_range", float("nan"))):
        with pytest.raises(ValueError, match=f"{field}={value}: must be greater than 0"):
            PhiConfig(**{field: value})
    with pytest.raises(ValueError, match=r"'phi-2' is not one of 'phi-1\.5'"):
        PhiConfig.preset("phi-2")

"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors (https://github.com/huggingface/peft)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LORA_TARGETS, LoraConfig, PhiConfig
from ..json_files import Fields
from ..model.lora import MODULES, delta
from . import inside
from .errors import ConversionError, ModelFileError
from .tensor_files import SafetensorsFile

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_OURS = re.compile(r"layers\.(\d+)\.lora\.adapters\.(\w+)\.([ab])")
_UNSUPPORTED = (
    *("use_rslora", "use_dora", "use_qalora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("fan_in_fan_out", "layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters"),
)
"""Fields that must be false, empty or null: with them an adapter is more than scale · B A beside some weights."""


def peft_name(name: str) -> str:
    """Convert an adapter's parameter name in a `Phi` to PEFT's; `peft.PeftModel` loads it on transformers' phi."""
    match = _OURS.fullmatch(name)
    if match is None:
        raise KeyError(f"{name} is no adapter's parameter")
    layer, target, which = match.groups()
    return f"base_model.model.model.layers.{layer}.{MODULES[target]}.lora_{which.upper()}.weight"


def peft_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """Make adapter_config.json. base: a folder, or a name on the hub."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


class PeftAdapter:
    """An adapter of a phi of known shape, whose names and shapes have been checked."""

    def __init__(self, folder: Path, config: PhiConfig) -> None:
        """Raises ConversionError for an adapter of another kind or shape, listing everything that does not fit."""
        fields = _read_config(folder)
        lora = LoraConfig(fields.whole("r", least=1), fields.number("lora_alpha"), fields.texts("target_modules"))
        self._scale = lora.scale
        path = inside.find(folder, WEIGHTS_FILE)
        if path is None:
            raise ConversionError(f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}: get the adapter again")
        self.path = path
        self._file = SafetensorsFile(path)
        self._pairs = _pairs(lora, config)
        self._check(config, lora)

    def change(self, part: str) -> Tensor | None:
        """Compute scale · B A of a Hugging Face tensor, in at least fp32; None if it has no adapter."""
        if part not in self._pairs:
            return None
        a, b = (self._file.read(name, 0, 0, shape[0]) for name, shape in self._pairs[part].items())
        return delta(a, b, self._scale)

    def _check(self, config: PhiConfig, lora: LoraConfig) -> None:
        unknown = [target for target in lora.targets if target not in LORA_TARGETS]
        if unknown:
            raise ConversionError(f"{self.path.parent}: target_modules has {unknown}, expected {list(LORA_TARGETS)}")
        expected = {name: shape for pair in self._pairs.values() for name, shape in pair.items()}
        found = self._file.headers()
        problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
        problems += [f"extra: {name} {header.shape}" for name, header in found.items() if name not in expected]
        for name, header in found.items():
            if name in expected and header.shape != expected[name]:
                problems.append(f"misshapen: {name} is {header.shape}, expected {expected[name]}")
            if not isinstance(header.dtype, torch.dtype):
                problems.append(f"wrong dtype: {name} holds {header.dtype}")
        if problems:
            raise ConversionError(
                f"{self.path} does not fit its {CONFIG_FILE} and its base of {config.num_hidden_layers} layers of "
                f"width {config.hidden_size}; {len(problems)} problems:\n  " + "\n  ".join(problems[:100])
            )


def base_of(folder: Path) -> str:
    """Read which weights an adapter belongs to: a folder, or a name on the hub."""
    return _read_config(folder).text("base_model_name_or_path")


def is_adapter(folder: Path) -> bool:
    return inside.find(folder, CONFIG_FILE) is not None


def _read_config(folder: Path) -> Fields:
    fields = inside.read_fields(folder, CONFIG_FILE)
    if fields is None:
        raise ConversionError(f"{folder} has no {CONFIG_FILE}")
    if fields.values.get("peft_type") != "LORA":
        fields.refuse("peft_type", "'LORA', the only kind of adapter that can be merged here")
    more = [name for name in _UNSUPPORTED if fields.values.get(name)]
    if fields.values.get("bias", "none") != "none":
        more.append("bias")
    if more:
        raise ModelFileError(
            f"{fields.where}: {', '.join(f'{name} is {fields.values[name]!r:.80}' for name in more)}, which is not "
            "supported: merge the adapter with peft (`merge_and_unload`), and name the merged model"
        )
    return fields


def _pairs(lora: LoraConfig, config: PhiConfig) -> Mapping[str, dict[str, tuple[int, int]]]:
    """Map each Hugging Face tensor with an adapter to the names and shapes of its A and B."""
    return {
        f"model.layers.{i}.{MODULES[target]}.weight": {
            peft_name(f"layers.{i}.lora.adapters.{target}.{which}"): shape
            for which, shape in zip("ab", shapes, strict=True)
        }
        for i in range(config.num_hidden_layers)
        for target, shapes in lora.shapes(config).items()
    }

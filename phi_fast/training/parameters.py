"""The parameters of a model that are trained, and the optimizer's groups of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.matrices import parameter_group
from ..recipes import Recipe


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; those that are not have no gradient and no optimizer state."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Split the trained parameters into Muon's matrices (`recipe.optimizer`), those with and those without weight decay
    (`recipe.decay`); each group is in the model's order, and empty ones are left out."""
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in trained_weights(model).items():
        groups[parameter_group(name, parameter.dim(), optimizer=recipe.optimizer, decay=recipe.decay)].append(parameter)
    options: tuple[dict[str, Any], ...] = (
        {"weight_decay": recipe.weight_decay, "muon": True},
        {"weight_decay": recipe.weight_decay},
        {},
    )
    return [
        {"params": parameters, "weight_decay": 0.0, **more}
        for parameters, more in zip(groups, options, strict=True)
        if parameters
    ]

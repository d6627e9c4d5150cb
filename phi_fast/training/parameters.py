"""The parameters of a model that are trained."""

from __future__ import annotations

from torch import nn


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; those that are not have no gradient and no optimizer state."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

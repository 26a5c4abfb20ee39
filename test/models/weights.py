"""Weights for networks that are compared: random, and none of them zero as fresh output layers are."""

from torch import nn


def normal_weights(module: nn.Module) -> nn.Module:
    """Draw all weights of a module, in place; those of norms lie around 1."""
    for name, parameter in module.named_parameters():
        is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(is_norm_weight), std=0.2 if parameter.ndim == 1 else 0.05)
    return module

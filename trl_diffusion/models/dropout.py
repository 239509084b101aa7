"""Dropout that is no module: TRL turns off modules, and many a layer of attention holds a number of its own."""

import torch


def turn_off_dropout(model: torch.nn.Module) -> None:
    """
    Set to zero what the layers of a model keep as the probability of a dropout that they apply themselves.

    Where it stayed, policy and reference would differ before anything was learnt. The configuration is left alone.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)

"""Dropout that is no module: TRL turns off modules, and many a layer of attention holds a number of its own."""

import torch


def turn_off_dropout(model: torch.nn.Module) -> None:
    """
    Set to zero what the layers of a model keep as the probability of a dropout that they apply themselves.

    Adapters keep one for each of their names. Where it stayed, policy and reference would differ before anything was
    learnt. The configuration is left alone.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
            elif "dropout" in name and isinstance(value, dict):
                value.update((key, 0.0) for key, kept in value.items() if isinstance(kept, float))

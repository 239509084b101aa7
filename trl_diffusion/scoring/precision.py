"""In which precision what is trained is held: adapters on quantised models, 4-bit layers, weights in half precision."""

from collections.abc import Callable
from typing import Any

import torch

from .adapters import base_of

_SAMPLED = 4096  # numbers of each weight that are looked at
_NOTICED = 0.01  # share of lost steps that is worth a word


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether its linear layers were loaded in 4 or 8 bits."""
    base = base_of(model)
    return getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)


def cast_adapters(model: torch.nn.Module, dtype: str) -> None:
    """Cast the trainable weights of a quantised model to `dtype`. Others are left alone."""
    if not is_quantised(model):
        return
    for name, parameter in model.named_parameters():
        # As TRL does: the magnitudes of DoRA move in steps that bfloat16 cannot hold
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def keep_differentiable(model: torch.nn.Module) -> None:
    """
    Stop bitsandbytes from repacking 4-bit weights on the CPU for inference.

    It does so at the first evaluation or precomputed score, for good, and the kernel for the packed format has no
    backward: training would go on with gradients that end at the last 4-bit layer, without an error.

    Raises:
        ValueError: that has already happened to this model.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weight of `{name}` was repacked for inference on the CPU, which has no gradient: the model "
                "was run in evaluation mode before training. Load it again and give it to the trainer first."
            )


def share_of_lost_updates(model: torch.nn.Module, learning_rate: float) -> tuple[float, str]:
    """
    How many of the trained weights a step of Adam, which is about the learning rate, would leave as they are.

    A number in bfloat16 moves in steps of 1/256 of itself, and a smaller step is rounded away; the optimiser has no
    other copy of it in which small steps would add up. The numbers themselves are tried, a sample of each weight.

    Args:
        model: whose trained weights are looked at.
        learning_rate: the largest of the run.

    Returns:
        The share, of all trained numbers, and the name of the first weight that is held in less than float32; 0 and
        an empty text if there is none.
    """
    lost, total, first = 0.0, 0, ""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not parameter.numel() or parameter.is_meta:
            continue
        total += parameter.numel()
        if torch.finfo(parameter.dtype).bits >= 32:
            continue
        first = first or name
        numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLED)]
        stays = [(numbers.float() + step).to(numbers.dtype) == numbers for step in (learning_rate, -learning_rate)]
        lost += parameter.numel() * (stays[0] & stays[1]).float().mean().item()
    return lost / max(total, 1), first


def warn_of_lost_updates(model: torch.nn.Module, learning_rate: float, warn: Callable[..., Any]) -> None:
    """Warn of trained weights in half precision, unless nearly all steps of this size reach them."""
    share, name = share_of_lost_updates(model, learning_rate)
    if share < _NOTICED:
        return
    cure = "leave `dtype` out of `model_init_kwargs`, or call `model.float()` on a model in memory"
    warn(
        "`learning_rate=%g` is lost on %.0f%% of the trained weights: `%s` and others are held in %s, where a step of "
        "that size is rounded away, and there is no copy in float32 in which it would add up. Hold what is trained in "
        "float32 (%s); `bf16=True` still computes in bfloat16. An adapter needs little memory for that.",
        *(learning_rate, 100 * share, name, str(model.get_parameter(name).dtype).removeprefix("torch.")),
        "`adapter_dtype='float32'`" if is_quantised(model) else cure,
    )

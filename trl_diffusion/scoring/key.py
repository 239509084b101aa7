"""The key under which scores are stored: everything that they depend on besides weights, tokens and draws."""

import json
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.families import family_of
from .adapters import base_of

# Parts of a model's configuration that change nothing of what it computes
_NOT_OF_THE_FUNCTION = (
    *("_name_or_path", "transformers_version", "use_cache", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# What scales an adapter beside its weights
_SCALING = ("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def scoring_key(model: torch.nn.Module, mask_token_id: int, mixed_precision: str) -> str:
    """
    Names the function that a model's weights are used in. Equal weights under equal keys give equal scores.

    Args:
        model: which scores, not wrapped by accelerate.
        mask_token_id: the token that hides others.
        mixed_precision: accelerate's word for it, `"no"` or `"bf16"` for instance.

    Returns:
        A text: the model's configuration, what scales its adapters, its family's record, the mask token and the
        precision.
    """
    base: PreTrainedModel = base_of(model)
    settings = {name: value for name, value in base.config.to_dict().items() if name not in _NOT_OF_THE_FUNCTION}
    parts = (settings, adapter_scaling(model), family_of(base.config).key(), mask_token_id, mixed_precision)
    return json.dumps(
        parts, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )


def adapter_scaling(model: Any) -> dict[str, dict[str, Any]]:
    """By name of the adapter, the settings that its weights are scaled by; empty without one."""
    configs = getattr(model, "peft_config", {})
    return {name: {key: getattr(c, key) for key in _SCALING if hasattr(c, key)} for name, c in configs.items()}

"""
From tokens to hidden states, and from hidden states to logits, as the family says: the parts of a model's forward that
are run apart, so that positions that are not masked need no logits.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .families import family_of


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """
    `(B, L, H)` hidden states of rows without padding, the last before the head.

    Args:
        model: with a backbone.
        input_ids: `(B, L)` tokens.
        inputs: what the backbone is given besides, such as the clean text before a block.

    Raises:
        ValueError: the backbone does not answer with them.
    """
    backbone: Any = model.base_model
    inputs |= {"use_cache": False} if takes(backbone.__class__, "use_cache") else {}
    outputs = backbone(input_ids=input_ids, **inputs)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(
            f"The backbone of `{type(model).__name__}`, a `{type(model.base_model).__name__}`, does not return a "
            f"`last_hidden_state` but a `{type(outputs).__name__}`, so masked positions cannot be scored alone. Remote "
            "code often hides it: use a class of transformers for this architecture, or write one, see "
            "docs/adding-a-model.md."
        )
    return hidden


@lru_cache
def takes(model_class: Any, argument: str) -> bool:
    """Whether the forward of a class of models has an argument of this name, or takes any."""
    parameters = inspect.signature(model_class.forward).parameters
    return argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def transformed(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the output embedding is applied to; `hidden` itself in most families."""
    for name in family_of(model.config).head.transform:
        hidden = _step(model, name)(hidden)
    return hidden


def _step(model: PreTrainedModel, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        if name in ACT2FN:
            return ACT2FN[name]
        raise ValueError(
            f"`{name}` in `Head(transform=...)` of {family_of(model.config).name} is neither a module of "
            f"`{type(model).__name__}` nor an activation of transformers. Give the path from the model, as "
            "`model.named_modules()` has it."
        ) from error


def finished(model: PreTrainedModel, projected: torch.Tensor) -> torch.Tensor:
    """Logits from what the output embedding gives: scaled and capped, where the family does that."""
    scale, soft_cap = family_of(model.config).head.numbers(model.config)
    projected = projected if scale == 1 else projected * scale
    return projected if soft_cap is None else torch.tanh(projected / soft_cap) * soft_cap


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """`(..., V)` logits of last hidden states `(..., H)`, the head being called."""
    head: nn.Module = model.get_output_embeddings()
    return finished(model, head(transformed(model, hidden)))


def logits_of_weight(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The same of [`transformed`] hidden states, from the weight and the bias of the head."""
    head: Any = model.get_output_embeddings()
    return finished(model, linear(hidden, head.weight, head.bias))


def acts_by_its_weight(head: Any) -> bool:
    """
    Whether a head's weight and bias are all there is to it, so that they can be used without calling it.

    Not so where a layer is quantised, adapted, or fetches its weights when it is called (offloading): there the weight
    is another thing than it looks, or does not become what it is trained to be. What is hooked to a plain layer is not
    seen here; [`~denoiser.check_denoiser`] compares numbers.
    """
    plain = type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    return bool(plain and head.weight.is_floating_point() and not head.weight.is_meta)

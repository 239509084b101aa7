"""Weights that are spread over processes: what FSDP2 and DeepSpeed ZeRO-3 need to see of a score."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..models.logits import hidden_states

Backbone = Callable[..., torch.Tensor]


def fsdp_is_asked_for(args: Any) -> bool:
    """Whether the run will be sharded by FSDP: by its arguments, or by `accelerate launch`."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_partitioned(module: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has cut the module's weights up."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has spread the model's weights."""
    return any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in model.parameters())


def recomputed_hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """
    The hidden states `(k, T, H)`, whose forward is run again in the backward; what follows is not.

    For ZeRO-3, where the output head's weight has to be gathered again in the backward. TRL's kernel does that, and
    knows the weight by what DeepSpeed has written on it; the copy that a checkpoint around the kernel would hand it
    has lost that. What is kept for each draw is one hidden state for each masked token.
    """
    if not torch.is_grad_enabled():
        return hidden_states(model, input_ids, **inputs)
    return checkpoint(hidden_states, model, input_ids, use_reentrant=False, **inputs)


@contextmanager
def gradients_stay_wanted(model: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """
    Leave `requires_grad` of every weight as it was, and give a function that restores it inside the block.

    PEFT takes it from the weights of an adapter that it switches off, and gives it to all of them when it switches the
    adapter on again. FSDP2 asks once, in its first forward, which may be the reference's, who will have a gradient.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)

    yield restore
    restore()

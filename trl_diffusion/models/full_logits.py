"""All logits of a model at once, each for the token at its position: what the plain definition of the ELBO asks for."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..estimators.elbo import token_logits
from .blocks import History, denoise, read
from .families import blocks_of, family_of
from .logits import logits_of


@token_logits.register(nn.Module)
def _(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    text: torch.Tensor,
    maskable: torch.Tensor,
) -> torch.Tensor:
    """Where the family has them; a module that is no model of transformers is asked as a function is."""
    inner = unwrapped(model)
    plain = token_logits.dispatch(object)
    if inner is None:
        return plain(model, input_ids, attention_mask, text, maskable)
    real = torch.ones_like(maskable).bool() if attention_mask is None else attention_mask.bool()
    blocks = blocks_of(inner.config, maskable.bool(), real)
    if blocks is None:
        return family_of(inner.config).in_place(plain(model, input_ids, attention_mask, text, maskable))
    rows = []
    for row, there in enumerate(real):
        logits = block_logits(inner, input_ids[row, there], text[row, there], blocks[row, there])
        rows.append(logits.new_zeros(len(there), logits.shape[-1]).index_put((there,), logits))
    return torch.stack(rows)


def unwrapped(model: Any) -> PreTrainedModel | None:
    """The model inside PEFT's, torch's and accelerate's wrappers, which leave logits where they are."""
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        model = getattr(model, "_orig_mod", None) if inner is None else inner
        if model is None:
            return None
    return model


def block_logits(
    model: PreTrainedModel, noised: torch.Tensor, text: torch.Tensor, numbers: torch.Tensor, shift: int | None = None
) -> torch.Tensor:
    """
    Logits of a block diffusion model for each token, its block noised and the blocks before it clean.

    Args:
        model: of a block diffusion family.
        noised: `(T,)` tokens, some of them hidden.
        text: `(T,)` the same, none of them hidden.
        numbers: `(T,)` the block of each.
        shift: how far before a token its logits stand; by default where the family has them.

    Returns:
        `(T, V)` logits.
    """
    clean = int((numbers < numbers[-1]).sum())
    history, hidden = History(numbers[:0]), []
    if clean:
        last, history = read(model, text[:clean], numbers[:clean])
        hidden = [last]
    on_top = denoise(model, noised.unsqueeze(0), numbers, 0, history)[0]
    shift = family_of(model.config).logit_shift if shift is None else shift
    before = (torch.arange(len(numbers), device=numbers.device) - shift).clamp(min=0)
    rows = torch.where(numbers[before] == numbers, before, len(numbers) + before)
    return logits_of(model, torch.cat([on_top, *hidden])[rows])

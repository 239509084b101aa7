"""Whether a text is what the greedy sampler would have written."""

from typing import Any

import torch

from ..estimators.elbo import token_logits
from ..models.families import blocks_of


@torch.no_grad()
def is_greedy(model: Any, input_ids: torch.Tensor, begin: int, mask_token_id: int) -> bool:
    """
    Whether greedy sampling on a canvas of the text's length, one token a step and the surest first, block by block of a
    block diffusion model, gives the text. It stops at the first token that is another.

    Args:
        model: in evaluation mode, without an adapter's wrapper.
        input_ids: `(1, L)` prompt and text.
        begin: where the text begins.
        mask_token_id: the mask token.
    """
    maskable = torch.arange(input_ids.shape[1], device=input_ids.device)[None] >= begin
    blocks = blocks_of(model.config, maskable, torch.ones_like(maskable))
    number = torch.zeros_like(input_ids) if blocks is None else blocks
    hidden = maskable.clone()
    while bool(hidden.any()):
        now = hidden & (number == number[hidden].min())
        noised = input_ids.masked_fill(hidden, mask_token_id)
        logits = token_logits(model, noised, None, input_ids, maskable)[now].float()
        logits[:, mask_token_id] = -torch.inf  # as in the sampler: neither is a token that it writes
        logits[:, model.config.vocab_size :] = -torch.inf
        confidence, predicted = logits.log_softmax(-1).max(-1)
        surest = confidence.argmax()
        if predicted[surest] != input_ids[now][surest]:
            return False
        hidden[0, now[0].nonzero()[surest]] = False
    return True

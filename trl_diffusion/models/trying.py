"""Trying a model on a few tokens, and leaving it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .families import family_of
from .family import Blocks


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def is_elsewhere(model: PreTrainedModel) -> bool:
    """Whether weights are not here, and no hook of the layer brings them: on the meta device, or ZeRO-3's shards."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(layer, "weight", None) for layer in layers if "forward" not in vars(layer)]
    return any(weight is not None and (weight.is_meta or weight.numel() == 0) for weight in weights)


def trial_tokens(model: PreTrainedModel, mask_token_id: int) -> torch.Tensor:
    """
    `(1, 8)` tokens, or as many as two blocks have of a block diffusion model: none of them the mask, and different as
    far as the vocabulary goes.
    """
    attention = family_of(model.config).attention
    number = 2 * attention.size_in(model.config) if isinstance(attention, Blocks) else 8
    device, size = model.get_input_embeddings().weight.device, model.config.vocab_size
    tokens = (mask_token_id + 1 + torch.arange(number).remainder(size - 1)).remainder(size).unsqueeze(0)
    return tokens if device.type == "meta" else tokens.to(device)


def close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same up to the rounding of another order of computation."""
    return torch.allclose(logits.to(expected.device).float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True)

"""Unsupervised classifier-free guidance (SMDM, arXiv 2410.18514) as a denoiser: the prompt counts for more."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..estimators.elbo import token_logits
from ..models.families import family_of


def check_guidance(config: PreTrainedConfig, cfg_scale: float) -> None:
    """Refuse a strength that is none, and a family whose sampler has no guidance either."""
    if not isinstance(cfg_scale, int | float) or not 0 <= cfg_scale < float("inf"):
        raise ValueError(f"`cfg_scale` must be a finite number that is not negative, got {cfg_scale!r}.")
    family = family_of(config)
    if cfg_scale and family.in_blocks:
        raise ValueError(
            f"`cfg_scale={cfg_scale}` is not there for block diffusion models such as {family.name}. Leave it out."
        )


def guided(
    model: Any, prompt: torch.Tensor, cfg_scale: float, mask_token_id: int
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """
    A function from noised rows to `(B, L, V)` logits,  (1 + w) * conditional - w * unconditional,  where the latter are
    those of the same rows with their prompt hidden too.

    Args:
        model: a masked diffusion model.
        prompt: `(1, L)` bool.
        cfg_scale: w.
        mask_token_id: the mask token.

    Raises:
        ValueError: there is no prompt to guide by.
    """
    if not bool(prompt.any()):
        raise ValueError(f"`cfg_scale={cfg_scale}` guides by the prompt, and a text has none: leave it out.")

    def logits(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        rows = (input_ids, input_ids.masked_fill(prompt, mask_token_id))
        conditional, alone = (token_logits(model, row, attention_mask, row, ~prompt).float() for row in rows)
        return alone + (cfg_scale + 1) * (conditional - alone)

    return logits

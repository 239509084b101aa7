"""The logits that predict a block of a canvas: of whole rows, or behind what was kept of them, and guided or not."""

from typing import Any

import torch

from .block_cache import BlockCache
from .families import family_of
from .row_logits import logits_at
from .sampler_arguments import SamplerArguments, Tokens


class CanvasLogits:
    """
    Asks a model.

    Args:
        model: of a family that predicts all masked tokens of a sequence at once.
        real: `(B, L)`, one at tokens that are not padding.
        prompt_length: padding included.
        arguments: of the sampler.
        tokens: what they mean.
    """

    def __init__(self, model: Any, real: torch.Tensor, prompt_length: int, arguments: SamplerArguments, tokens: Tokens):
        self._real, self._prompt_length = real, prompt_length
        self._scale, self._mask = arguments.cfg_scale, tokens.mask
        self._with_prompt, self._without_prompt = (_way(model, arguments) for _ in range(2))

    def __call__(self, rows: torch.Tensor, numbers: list[int], block: tuple[int, int]) -> torch.Tensor:
        """`(b, n, V)` logits for the n tokens of a block, of `rows` `(b, L)` that are those of these numbers."""
        real = self._real[numbers]
        conditional = self._with_prompt(rows, real, numbers, block)
        if self._scale == 0:
            return conditional
        prompt_masked = rows.clone()
        prompt_masked[:, : self._prompt_length] = self._mask
        unconditional = self._without_prompt(prompt_masked, real, numbers, block).float()
        return conditional.float().sub_(unconditional).mul_(self._scale + 1).add_(unconditional)


def _way(model: Any, arguments: SamplerArguments) -> Any:
    """How logits are asked for."""
    if arguments.block_cache is None:
        return _Whole(model)
    return BlockCache(model, arguments.block_cache, arguments.cache_refresh)


class _Whole:
    """What [`BlockCache`] does, without keeping anything."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(
        self, rows: torch.Tensor, real: torch.Tensor, numbers: list[int], block: tuple[int, int]
    ) -> torch.Tensor:
        keep = family_of(self.model.config).predicting(torch.arange(*block, device=rows.device))
        return logits_at(self.model, rows, real, keep)

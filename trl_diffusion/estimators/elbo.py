"""
The Monte Carlo ELBO of a response under a masked diffusion language model.

With masks m_k and weights w_k,i from [`draw_masks`] (VRPO, arXiv 2505.19223, eqs. 5-6 with eq. 12 or 14):

    ELBO(y | x)  ~  sum_k sum_{i in m_k}  w_k,i * log p(y_i | y with m_k hidden, x)

It bounds log p(y | x) from below in expectation. Nats, summed over tokens: not a mean per token.

This module draws nothing: it scores the draws it is given, on any denoiser.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .draws import MaskDraws


class NonFiniteError(ValueError):
    """
    A log-probability that is not finite.

    Args:
        message: what was found where.
        row: of the batch.
        draw: of the row.
    """

    def __init__(self, message: str, row: int, draw: int):
        super().__init__(message)
        self.row, self.draw = row, draw


@dataclass(frozen=True)
class ELBO:
    """
    An estimate of the ELBO of B responses.

    Args:
        terms: `(B, L)` nats, what each token contributes; zero outside the response.
        samples: `(K, B)` nats, the estimate of each draw alone; their mean over K is `value`.
        draws_per_unit: that many draws in a row depend on each other, see [`MaskDraws`].
        control: `(K, B)` nats, what the control variate's kappa was multiplied with in `samples`; none without one.
        kappa: that kappa.
        log_probs: `(K, B, L)` nats, of each token where it is masked, zero elsewhere; detached.
    """

    terms: torch.Tensor
    samples: torch.Tensor
    draws_per_unit: int = 1
    control: torch.Tensor | None = None
    kappa: float = 0.0
    log_probs: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def value(self) -> torch.Tensor:
        """`(B,)` nats, the estimate."""
        return self.terms.sum(-1)

    @property
    def standard_error(self) -> torch.Tensor:
        """
        `(B,)` nats, of `value` over units of draws; NaN for a single unit.

        As a rule too large when levels are stratified; with mirror pairs and an odd K a few percent too small.
        """
        return variance_of_mean(self.samples, self.draws_per_unit).sqrt()


def variance_of_mean(samples: torch.Tensor, draws_per_unit: int = 1) -> torch.Tensor:
    """
    Estimated variance of the mean of `samples` `(K, B)` over K, from the spread of units of draws.

    With the residuals summed in each of U units, U / (U - 1) times the sum of their squares over K^2: the
    cluster-robust variance, and the usual one where each draw is a unit. NaN for a single unit.
    """
    residuals = sum_units(samples - samples.mean(0), draws_per_unit) / samples.shape[0]
    units = len(residuals)
    if units == 1:
        return torch.full_like(samples[0], torch.nan)
    return residuals.square().sum(0) * units / (units - 1)


def sum_units(samples: torch.Tensor, draws_per_unit: int) -> torch.Tensor:
    """`(U, B)` sums of `samples` `(K, B)` over the draws of each unit; the last unit may be smaller."""
    return torch.stack([unit.sum(0) for unit in samples.split(draws_per_unit)])


def elbo(
    model: Callable[..., Any],
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    draws: MaskDraws,
    mask_token_id: int | None = None,
) -> ELBO:
    """
    Score given draws with a denoiser, one forward per draw: the plain definition, differentiable, with full logits.

    Args:
        model: called as `model(input_ids=..., attention_mask=...)` with masked tokens replaced; returns `(B, L, V)`
            logits for the token at each position, or an object with `logits`.
        input_ids: `(B, L)` prompts and responses.
        maskable: `(B, L)` bool, the response tokens, for which `draws` were made.
        attention_mask: `(B, L)`, one at real tokens.
        draws: the masks and weights.
        mask_token_id: the mask token. Defaults to `model.config.mask_token_id`.

    Returns:
        [`ELBO`], in float32 or wider.

    Raises:
        ValueError: draws that mask what is not maskable, or no mask token.
        NonFiniteError: a log-probability is not finite.
    """
    if mask_token_id is None:
        mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    if mask_token_id is None:
        raise ValueError("`model` has no `config.mask_token_id`: pass `mask_token_id`.")
    if bool((draws.masked & ~maskable.bool()).any()):
        raise ValueError("`draws` mask positions that are not maskable: they were made for other rows.")
    log_probs = [
        _token_log_probs(model, noise_inputs(input_ids, masked, mask_token_id), input_ids, attention_mask)
        for masked in draws.masked
    ]
    return weigh(torch.stack(log_probs), draws)


def noise_inputs(input_ids: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Replace the tokens at `masked` by the mask token; the last dimension is the position, the others broadcast."""
    return input_ids.masked_fill(masked, mask_token_id)


def weigh(log_probs: torch.Tensor, draws: MaskDraws) -> ELBO:
    """
    Sum over draws of weight times log-probability.

    Args:
        log_probs: `(K, B, L)` log-probability of each token where it is masked; ignored elsewhere.
        draws: the masks and weights.

    Raises:
        NonFiniteError: a masked token's log-probability is not finite.
    """
    log_probs = log_probs.masked_fill(~draws.masked, 0.0)
    _refuse_non_finite(log_probs)
    samples, control = draws.samples(log_probs.detach())
    return ELBO(
        terms=(log_probs * draws.weight).sum(0),
        samples=samples,
        draws_per_unit=draws.draws_per_unit,
        control=control,
        kappa=draws.control.settings.kappa if draws.control else 0.0,
        log_probs=log_probs.detach(),
    )


def _token_log_probs(model, noised_input_ids, targets, attention_mask):
    outputs = model(input_ids=noised_input_ids, attention_mask=attention_mask)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _refuse_non_finite(log_probs: torch.Tensor) -> None:
    bad = ~torch.isfinite(log_probs)
    if not bool(bad.any()):
        return
    draw, row, position = bad.nonzero()[0].tolist()
    raise NonFiniteError(
        f"The log-probability of a masked token is {log_probs[draw, row, position].item()} (row {row} of the batch, "
        f"position {position}, draw {draw}; {int(bad.sum())} in all). The model's logits are not finite: check its "
        "weights, the precision it was loaded in, and the learning rate.",
        row,
        draw,
    )

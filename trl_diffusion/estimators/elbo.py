"""
The Monte Carlo ELBO of a response under a masked diffusion language model.

With masks m_k and weights w_k,i from [`draw_masks`] (VRPO, arXiv 2505.19223, eqs. 5-6 with eq. 12 or 14):

    ELBO(y | x)  ~  sum_k sum_{i in m_k}  w_k,i * log p(y_i | y with m_k hidden, x)

It bounds log p(y | x) from below in expectation. Nats, summed over tokens: not a mean per token.

This module draws nothing: it scores the draws it is given, on any denoiser.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch

from .draws import MaskDraws, check_shapes


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


@dataclass(frozen=True, repr=False)
class ELBO:
    """
    An estimate of the ELBO of B responses.

    Args:
        terms: `(B, L)` nats, what each token contributes; zero outside the response.
        samples: `(K, B)` nats, the estimate of each draw alone; their mean over K is `value`.
        draws_per_unit: that many draws in a row depend on each other, see [`MaskDraws`].
        control: `(K, B)` nats, what the `learnt_kappa` of the control variate was multiplied with in `samples`; none
            without one.
        kappa: that kappa.
        log_probs: `(K, B, L)` nats, of each token where it is masked, zero elsewhere; detached.
    """

    terms: torch.Tensor
    samples: torch.Tensor
    draws_per_unit: int = 1
    control: torch.Tensor | None = None
    kappa: float = 0.0
    log_probs: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __repr__(self) -> str:
        return f"ELBO(value={self.value.detach()}, standard_error={self.standard_error}, draws={len(self.samples)})"

    @property
    def value(self) -> torch.Tensor:
        """`(B,)` nats, the estimate."""
        return self.terms.sum(-1)

    @property
    def standard_error(self) -> torch.Tensor:
        """
        `(B,)` nats, of `value` over units of draws, see [`variance_of_mean`]; NaN for a single unit.

        As a rule too large when levels are stratified, since units are taken to be independent.
        """
        return variance_of_mean(self.samples, self.draws_per_unit).sqrt()


def variance_of_mean(samples: torch.Tensor, draws_per_unit: int = 1) -> torch.Tensor:
    """
    Estimated variance of the mean of `samples` `(K, B)` over K, from the spread of units of draws.

    Let T_u be the sum of the n_u draws of unit u, V_u its variance, and r_u = T_u - n_u * mean its residual. Units are
    independent, so the variance wanted is  sum_u V_u / K^2,  and

        E[r_u^2]  =  V_u (1 - 2 n_u / K) + (n_u / K)^2 sum_v V_v.

    That is solved for the sum, whatever the V_u are: unbiased, also where the last unit is smaller, and never negative.
    Of two units there is one residual. It says enough if they are of one size; if not, a pair and a single draw, no
    quadratic of three draws is unbiased and never negative, and V_u is taken to be in proportion to n_u. NaN for a
    single unit.
    """
    num_draws = samples.shape[0]
    sizes = sum_units(torch.ones_like(samples), draws_per_unit)
    squares = (sum_units(samples, draws_per_unit) - sizes * samples.mean(0)).square()
    if len(sizes) == 1:
        return torch.full_like(samples[0], torch.nan)
    if len(sizes) == 2:
        return (squares / sizes).sum(0) / num_draws
    left = 1 - 2 * sizes / num_draws
    shared = 1 + (sizes.square() / left).sum(0) / num_draws**2
    return (squares / left).sum(0) / (shared * num_draws**2)


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
            logits, or an object with `logits`. Those of a function are for the token at each position; those of a
            transformers model, wrapped or not, are taken from where its family puts them (Dream: one place before).
        input_ids: `(B, L)` prompts and responses.
        maskable: `(B, L)` bool, the response tokens, for which `draws` were made.
        attention_mask: `(B, L)`, one at real tokens.
        draws: the masks and weights.
        mask_token_id: the mask token. Defaults to `model.config.mask_token_id`.

    Returns:
        [`ELBO`], in float32 or wider.

    Raises:
        ValueError: no mask token, or one in the text; draws of other rows; padding that is maskable.
        NonFiniteError: a log-probability is not finite.
    """
    if mask_token_id is None:
        mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    if mask_token_id is None:
        raise ValueError("`model` has no `config.mask_token_id`: pass `mask_token_id`.")
    _check_rows(input_ids, maskable, attention_mask, draws, mask_token_id)
    log_probs = [
        _token_log_probs(model, noise_inputs(input_ids, masked, mask_token_id), input_ids, attention_mask, maskable)
        for masked in draws.masked
    ]
    return weigh(torch.stack(log_probs), draws)


def _check_rows(input_ids, maskable, attention_mask, draws: MaskDraws, mask_token_id: int) -> None:
    """Refuse what would be scored as something else than it is."""
    check_shapes(maskable, input_ids=input_ids, attention_mask=attention_mask)
    if draws.masked.shape[1:] != maskable.shape:
        raise ValueError(
            f"`draws` are for (B, L) = {tuple(draws.masked.shape[1:])} and `maskable` is {tuple(maskable.shape)}: they "
            "were made for other rows. Draw with `draw_masks(maskable, ...)`."
        )
    if bool((draws.masked & ~maskable.bool()).any()):
        raise ValueError("`draws` mask positions that are not maskable: they were made for other rows.")
    real = torch.ones_like(maskable, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if bool((maskable.bool() & ~real).any()):
        raise ValueError("`maskable` has positions that are padding in `attention_mask`: they would count as response.")
    rows = ((input_ids == mask_token_id) & real).any(-1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"Rows {rows} of `input_ids` contain the mask token ({mask_token_id}), which would be taken for noise "
            "wherever a draw shows it. Give the text as it is: `elbo` hides tokens itself."
        )


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
        kappa=draws.control.settings.learnt_kappa if draws.control else 0.0,
        log_probs=log_probs.detach(),
    )


@singledispatch
def token_logits(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    text: torch.Tensor,
    maskable: torch.Tensor,
) -> torch.Tensor:
    """
    `(B, L, V)` logits for the token at each position of noised rows.

    Whatever can be called is asked for just that. A type of model whose logits stand elsewhere registers how it is to
    be asked, as `models/full_logits.py` does for those that belong to a family; nothing else moves logits. `text`, the
    rows as they were, is for models that see noise in a part of a row only; `maskable` says where its response is.
    """
    outputs = model(input_ids=input_ids, attention_mask=attention_mask)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def _token_log_probs(model, noised_input_ids, targets, attention_mask, maskable):
    logits = token_logits(model, noised_input_ids, attention_mask, targets, maskable)
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

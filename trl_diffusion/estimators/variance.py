"""
What one scored set of draws says about the variance of every estimator: no further forwards.

A pair was scored on M draws of stratified mirror pairs. A mirror pair is two fixed-count draws, levels are evenly
spread, and every n-th mirror pair is again a stratified set. So the same numbers hold many repeats of an estimate with
K draws, of any linear scheme: only the weights change. Where the policy is its reference, its log-probabilities stand
in for the log-ratios.

This module knows nothing of models.
"""

from dataclasses import dataclass

import torch

from .control_variate import Control, ControlVariate

_LEVEL_BINS, _DRAWS_PER_BIN = 8, 8  # fewer draws at a level hardly ever hide the same token twice


@dataclass(frozen=True)
class Scored:
    """
    One response, scored on M mirror-pair draws.

    Args:
        masked: `(M, T)` bool over the T tokens of the response; draws 2u and 2u + 1 are a mirror pair.
        log_ratios: `(M, T)` nats, policy minus reference, zero where not masked.
    """

    masked: torch.Tensor
    log_ratios: torch.Tensor


def repeats(scored: Scored, num_draws: int, control_variate: ControlVariate | None = None) -> torch.Tensor:
    """
    Estimates from mirror pairs with K = `num_draws`, K even: `(M / K,)` nats, each from levels that are evenly spread.
    """
    masked, values = _deal(scored.masked, num_draws, 2), _deal(scored.log_ratios, num_draws, 2)
    inclusion = masked.sum(-1).double() / masked.shape[-1]  # (K, R)
    scale = 1 / (inclusion * num_draws)
    if control_variate is None:
        return (scale * values.double().sum(-1)).sum(0)
    everything = torch.ones_like(masked[0])
    weight = Control(control_variate, masked, everything, scale, inclusion, 2).weight()
    return (weight * values).sum((0, 2))


def fixed_count_repeats(scored: Scored, num_draws: int) -> torch.Tensor:
    """Estimates from stratified fixed counts, `(M / 2K,)` nats: one draw of each mirror pair is used."""
    masked, values = _deal(scored.masked[::2], num_draws, 1), _deal(scored.log_ratios[::2], num_draws, 1)
    return (values.double().sum(-1) * masked.shape[-1] / masked.sum(-1)).mean(0)


def fixed_count_samples(scored: Scored) -> torch.Tensor:
    """`(M,)` nats: the estimate of each fixed-count draw alone, (L'/l) S(m)."""
    return scored.log_ratios.double().sum(-1) * scored.masked.shape[1] / scored.masked.sum(-1)


def _deal(rows: torch.Tensor, num_draws: int, unit: int) -> torch.Tensor:
    """`(K, R, T)`: units dealt out in turn to R repeats, so that each gets evenly spread ones."""
    per_repeat = num_draws // unit
    rows = rows[: len(rows) // num_draws * num_draws]
    dealt = rows.unflatten(0, (per_repeat, -1, unit))  # (units of a repeat, R, unit, T)
    return dealt.transpose(1, 2).flatten(0, 1)


def variance_parts(scored: Scored) -> dict[str, float]:
    """
    Analysis of the variance of one fixed-count draw (L'/l) S(m), in nats^2.

    - `level`: variance of its mean at level l over l.
    - `tokens`: from which tokens were hidden, mean over levels of  (L'/l)^2 l (L' - l) / (L' - 1) Var_i mu_i,  with
      mu_i the mean of token i's log-ratio at the level. Squares of means are products of draws that are no mirror pair.
    - `context`: the rest, from which others were hidden beside a token.

    Levels are taken together in bins. Parts are unbiased up to that, so a small one may come out below zero.
    """
    length, samples = scored.masked.shape[1], fixed_count_samples(scored)
    order = scored.masked.sum(1).argsort(stable=True)
    bins = order.tensor_split(max(1, min(_LEVEL_BINS, len(order) // _DRAWS_PER_BIN)))
    within = torch.stack([samples[chunk].var() for chunk in bins])
    means = torch.stack([samples[chunk].mean() for chunk in bins])
    sizes = torch.tensor([len(chunk) for chunk in bins])
    level = means.var(correction=0) - (within / sizes).mean() * (1 - 1 / len(bins))
    tokens = torch.stack([_token_part(scored, chunk, length) for chunk in bins]).mean()
    return {"level": level.item(), "tokens": tokens.item(), "context": (within.mean() - tokens).item()}


def _token_part(scored: Scored, draws: torch.Tensor, length: int) -> torch.Tensor:
    """The summand of `tokens` of one bin of levels."""
    if length == 1:
        return torch.zeros((), dtype=torch.float64)
    masked, values = scored.masked[draws].double(), scored.log_ratios[draws].double()
    other = (draws.unsqueeze(0) // 2 != draws.unsqueeze(1) // 2).double()  # not the same mirror pair
    together = (other * (masked @ masked.T)).sum().clamp(min=1)
    square_of_means = (other * (values @ values.T)).sum() / together
    mean = values.sum(1) / masked.sum(1)
    squared_mean = (other * mean.outer(mean)).sum() / other.sum().clamp(min=1)
    count = masked.sum(1)
    factor = (length**2 / count * (length - count) / (length - 1)).mean()
    return factor * (square_of_means - squared_mean)

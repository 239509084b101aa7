"""
What one scored set of draws says about the variance of every estimator: no further forwards.

A pair was scored on S independent sets of M draws: stratified mirror pairs. A mirror pair is two fixed-count draws,
levels are evenly spread, and every n-th mirror pair is again a stratified set. So the same numbers hold many repeats of
an estimate with K draws, of any linear scheme with this law of levels: only the weights change. What independent draws
with uniform levels would do is seen by weighing again. Where the policy is its reference, its log-probabilities stand
in for the log-ratios.

The repeats of one set are not independent: their levels lie between each other's. What that does to their mean is seen
by comparing sets.

This module knows nothing of models.
"""

from dataclasses import dataclass

import torch

from .control_variate import Control, ControlVariate
from .levels import importance

_LEVEL_BINS, _DRAWS_PER_BIN = 8, 8  # fewer draws at a level hardly ever hide the same token twice


@dataclass(frozen=True)
class Scored:
    """
    One response, scored on S sets of M mirror-pair draws.

    Args:
        masked: `(S, M, T)` bool over the T tokens of the response; draws 2u and 2u + 1 are a mirror pair.
        log_ratios: `(S, M, T)` nats, policy minus reference, zero where not masked.
        level_concentration: of the law of levels that the draws have; None if it goes by the length.
        sizes: of a block diffusion model, how many of the tokens lie in each block, from left to right. Blocks were
            drawn for independently, so that estimates and variances are sums over them.
    """

    masked: torch.Tensor
    log_ratios: torch.Tensor
    level_concentration: float | None = 1.0
    sizes: tuple[int, ...] = ()

    def blocks(self) -> list["Scored"]:
        """Each block as a response of its own; the response itself if it is not drawn for by blocks."""
        if len(self.sizes) < 2:
            return [self]
        parts = zip(self.masked.split(self.sizes, -1), self.log_ratios.split(self.sizes, -1), strict=True)
        return [Scored(*part, self.level_concentration) for part in parts]

    @property
    def importance(self) -> torch.Tensor:
        """`(S, M)` float64: how likely the number of hidden tokens is under the uniform law over under this one."""
        return importance(self.masked.sum(-1), self.masked.shape[-1], self.level_concentration)


def repeats(scored: Scored, num_draws: int, control_variate: ControlVariate | None = None) -> torch.Tensor:
    """
    Estimates from mirror pairs with K = `num_draws`, K even and a divisor of M: `(S, M / K)` nats, each from levels
    that are evenly spread.
    """
    return torch.stack([_repeats(block, num_draws, control_variate) for block in scored.blocks()]).sum(0)


def _repeats(scored: Scored, num_draws: int, control_variate: ControlVariate | None) -> torch.Tensor:
    parts = (scored.masked, scored.log_ratios, scored.importance.unsqueeze(-1))
    masked, values, weight = (_deal(x, num_draws, 2) for x in parts)
    inclusion = masked.sum(-1).double() / masked.shape[-1]  # (K, S * M / K)
    scale = weight.squeeze(-1) / (inclusion * num_draws)
    if control_variate is None:
        estimates = (scale * values.double().sum(-1)).sum(0)
    else:
        everything = torch.ones_like(masked[0])
        weight = Control(control_variate, masked, everything, scale, inclusion, 2).weight()
        estimates = (weight * values).sum((0, 2))
    return estimates.view(len(scored.masked), -1)


def fixed_count_repeats(scored: Scored, num_draws: int) -> torch.Tensor:
    """Estimates from stratified fixed counts, `(S, M / 2K)` nats: one draw of each mirror pair is used."""
    values = _deal(fixed_count_samples(scored)[:, ::2].unsqueeze(-1), num_draws, 1)
    return values.mean(0).view(len(scored.masked), -1)


def fixed_count_samples(scored: Scored) -> torch.Tensor:
    """`(S, M)` nats: the estimate of each fixed-count draw alone, (L'/l) S(m) times its importance."""
    return torch.stack([block.importance * _plain_samples(block) for block in scored.blocks()]).sum(0)


def _plain_samples(scored: Scored) -> torch.Tensor:
    """(L'/l) S(m), as for uniform levels."""
    return scored.log_ratios.double().sum(-1) * scored.masked.shape[-1] / scored.masked.sum(-1)


def paper_variance(scored: Scored) -> float:
    """
    Variance of one fixed-count draw with a uniform level, VRPO's eq. 14.

    With f = (L'/l) S(m) and r a draw's importance, E f^2 is the mean of r f^2, and E f that of r f. The square of the
    latter is too large by its variance, which is that of sets over S.
    """
    return sum(map(_paper_variance, scored.blocks()))


def _paper_variance(scored: Scored) -> float:
    plain = _plain_samples(scored)
    mean = fixed_count_samples(scored).mean(1)
    square_of_mean = mean.mean().square() - mean.var() / len(mean)
    return ((scored.importance * plain.square()).mean() - square_of_mean).item()


def variance_of_repeats(values: torch.Tensor) -> float:
    """
    Variance of a single estimate, from the `(S, R)` estimates of S >= 2 independent sets.

    Those of a set depend on each other, so the spread about their mean is not all of it: E (x - mean)^2 = Var x -
    Var mean. The second is the variance over sets, divided by S. With R = 1 this is the usual estimate.
    """
    about_mean = (values - values.mean()).square().mean()
    return (about_mean + values.mean(1).var() / len(values)).item()


def variance_between(estimates: torch.Tensor) -> float:
    """
    Variance over P >= 2 pairs of what is estimated, without the noise of the estimates.

    Args:
        estimates: `(P, 2)`, each from draws of its own: their noise is independent, so that their covariance over pairs
            is the variance of the truth. May come out below zero.
    """
    return torch.cov(estimates.double().T)[0, 1].item()


def _deal(rows: torch.Tensor, num_draws: int, unit: int) -> torch.Tensor:
    """`(K, S * R, T)` of `(S, M, T)`: the units of each set dealt out in turn to R repeats, which are evenly spread."""
    dealt = rows.unflatten(1, (num_draws // unit, -1, unit))  # (S, units of a repeat, R, unit, T)
    return dealt.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)


def variance_parts(scored: Scored) -> dict[str, float]:
    """
    Analysis of the variance of one fixed-count draw (L'/l) S(m), times its importance, in nats^2.

    - `level`: variance of its mean at level l over l.
    - `tokens`: from which tokens were hidden, mean over levels of  (r L'/l)^2 l (L' - l) / (L' - 1) Var_i mu_i,  with r
      the importance and mu_i the mean of token i's log-ratio at the level. Squares of means are products of draws that
      are no mirror pair.
    - `context`: the rest, from which others were hidden beside a token.

    Levels are taken together in bins. Parts are unbiased up to that, so a small one may come out below zero.
    """
    of_blocks = [_variance_parts(block) for block in scored.blocks()]
    return {part: sum(each[part] for each in of_blocks) for part in of_blocks[0]}


def _variance_parts(scored: Scored) -> dict[str, float]:
    masked, values = scored.masked.flatten(0, 1), scored.log_ratios.flatten(0, 1)
    samples = fixed_count_samples(scored).flatten()
    order = masked.sum(1).argsort(stable=True)
    bins = order.tensor_split(max(1, min(_LEVEL_BINS, len(order) // _DRAWS_PER_BIN)))
    within = torch.stack([samples[chunk].var() for chunk in bins])
    means = torch.stack([samples[chunk].mean() for chunk in bins])
    sizes = torch.tensor([len(chunk) for chunk in bins])
    level = means.var(correction=0) - (within / sizes).mean() * (1 - 1 / len(bins))
    values = values.double() * scored.importance.flatten().unsqueeze(1)
    tokens = torch.stack([_token_part(masked[chunk], values[chunk], chunk // 2) for chunk in bins]).mean()
    return {"level": level.item(), "tokens": tokens.item(), "context": (within.mean() - tokens).item()}


def _token_part(masked: torch.Tensor, values: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """The summand of `tokens` of one bin of levels: masks and log-ratios `(n, T)`, and the mirror pair of each draw."""
    length = masked.shape[1]
    if length == 1:
        return torch.zeros((), dtype=torch.float64)
    masked, values = masked.double(), values.double()
    other = (pair.unsqueeze(0) != pair.unsqueeze(1)).double()
    together = (other * (masked @ masked.T)).sum().clamp(min=1)
    square_of_means = (other * (values @ values.T)).sum() / together
    count = masked.sum(1)
    mean = values.sum(1) / count
    squared_mean = (other * mean.outer(mean)).sum() / other.sum().clamp(min=1)
    factor = (length**2 / count * (length - count) / (length - 1)).mean()
    return factor * (square_of_means - squared_mean)

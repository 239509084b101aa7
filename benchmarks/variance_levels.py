"""
Where the variance of one draw comes from, and the variance of independent draws, from masks sorted by level.

For a response of length L and a level l (number of hidden tokens) let  z = S(m) / l,  S(m) the sum over the hidden
tokens of some f_i(m), such as the log-ratio of policy and reference. Let m1(l) and q(l) be the mean of z and of z^2
over the masks m of level l. A fixed-count draw is  X = L z  with l uniform, a Bernoulli draw  X = l z / t  with
l ~ Bin(L, t):

    fixed counts   E X = sum_l m1(l),                      E X^2 = L sum_l q(l)
    Bernoulli      E X = E_t sum_l Bin(l; L, t) l m1(l)/t, E X^2 = E_t sum_l Bin(l; L, t) l^2 q(l) / t^2

E_t is over t in (EPSILON, 1): without that bound the second moment of a Bernoulli draw is infinite, since
E_t Bin(1; L, t) / t^2 is the integral of about L / t. Fixed counts need no bound. What is needed at levels that were
not looked at is interpolated linearly in log l, which makes every sum over levels a weighted sum over those that were.

The analysis of variance of a single fixed-count draw, Var X = level + tokens + context:

    level     Var_l E[X | l]
    tokens    E_l Var( L/l sum_{i in m} mu_i(l) | l ),  mu_i(l) = E[f_i | i in m, |m| = l]
              = E_l (L/l)^2 l (L - l) / (L (L - 1)) (sum_i mu_i^2 - L mean_i(mu_i)^2)
    context   the rest: how f_i depends on which others are hidden

Squares of means are estimated without bias from products of different masks. Few masks of a low level meet in a token,
so for 1 < l < L/8 the share of `tokens` in the variance within a level is interpolated linearly in l, from the 1 that
it is at l = 1.
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch

EPSILON = 1e-3
LOW_LEVELS = (1, 2, 3, 4, 6, 8)
MASKS_OF_A_LEVEL = 8
HIDDEN_AT_LOW_LEVELS = 64  # more masks of the low levels, which the variance is sensitive to


@dataclass(frozen=True)
class Levels:
    """
    Masks of some levels of a response.

    Args:
        length: L.
        levels: the J levels, ascending, the first 1 and the last L.
        masks: of each level, `(M_j, L)` bool.
        share: `(J,)`, the weights of the levels in the mean of an interpolated function over {1..L}.
    """

    length: int
    levels: list[int]
    masks: list[torch.Tensor]
    share: torch.Tensor

    @property
    def whole(self) -> list[bool]:
        """Whether a level is there with all its masks."""
        return [len(m) == comb(self.length, level) for m, level in zip(self.masks, self.levels, strict=True)]


def make_levels(length: int, everything: bool, seed: int = 0) -> Levels:
    """All masks (`everything`), or random ones of about twenty levels."""
    generator = torch.Generator().manual_seed(seed)
    levels = list(range(1, length + 1))
    if not everything:
        spaced = {max(1, round(length * step / 12)) for step in range(1, 13)}
        levels = sorted({level for level in LOW_LEVELS if level < length} | spaced)
    masks = []
    for level in levels:
        count = max(MASKS_OF_A_LEVEL, HIDDEN_AT_LOW_LEVELS // level)
        if everything or comb(length, level) <= count:
            masks.append(_subsets(length, level))
        elif level == 1:
            masks.append(torch.eye(length, dtype=torch.bool)[torch.randperm(length, generator=generator)[:count]])
        else:
            masks.append(torch.rand(count, length, generator=generator).argsort(1).argsort(1) < level)
    return Levels(length, levels, masks, hats(length, levels).mean(1))


def _subsets(length: int, level: int) -> torch.Tensor:
    masks = torch.zeros(comb(length, level), length, dtype=torch.bool)
    for row, hidden in enumerate(combinations(range(length), level)):
        masks[row, list(hidden)] = True
    return masks


def hats(length: int, levels: list[int]) -> torch.Tensor:
    """`(J, L)`: g(l) is about the sum over j of hats[j, l - 1] g(levels[j]), linear in log l between two levels."""
    knots, at = torch.tensor(levels).double().log(), torch.arange(1, length + 1).double().log()
    right = torch.searchsorted(knots, at).clamp(1, len(levels) - 1) if len(levels) > 1 else torch.zeros_like(at).long()
    if len(levels) == 1:
        return torch.ones(1, length, dtype=torch.float64)
    fraction = ((at - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
    weights, column = torch.zeros(len(levels), length, dtype=torch.float64), torch.arange(length)
    weights[right - 1, column] = 1 - fraction
    weights[right, column] += fraction
    return weights


def bernoulli_moments(length: int, power: int, epsilon: float = EPSILON, nodes: int = 20_000) -> torch.Tensor:
    """`(L,)`: E_t of Bin(l; L, t) (l / t)^power for l = 1..L, t uniform on (epsilon, 1), by midpoints in log t."""
    edges = torch.linspace(torch.tensor(epsilon).log().item(), 0.0, nodes + 1, dtype=torch.float64)
    t = (edges[1:] + edges[:-1]).div(2).exp()
    mass = (edges[1:] - edges[:-1]) * t / (1 - epsilon)
    moments = []
    for level in range(1, length + 1):
        binomial = torch.distributions.Binomial(length, t).log_prob(torch.tensor(float(level)).double()).exp()
        moments.append((mass * binomial * (level / t) ** power).sum())
    return torch.stack(moments)


# --- statistics of one response --------------------------------------------------------------------------------------


def level_means(levels: Levels, sums: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(J,)` mean and mean square of z at each level, from S(m) of each level's masks."""
    z = [s.double() / level for s, level in zip(sums, levels.levels, strict=True)]
    return torch.stack([v.mean() for v in z]), torch.stack([v.square().mean() for v in z])


def mean_over_levels(levels: Levels, sums: list[torch.Tensor]) -> float:
    """E X = L E_l m1(l): the ELBO, or what `sums` are of; exact if all masks are there."""
    return (levels.length * (levels.share * level_means(levels, sums)[0]).sum()).item()


def fixed_count_parts(levels: Levels, sums: list[torch.Tensor]) -> dict[str, float]:
    """Of one fixed-count draw: `level`, Var of its level's mean, and `within`, the mean variance within a level."""
    means, squares = level_means(levels, sums)
    counts = torch.tensor([1.0 if whole else len(s) for s, whole in zip(sums, levels.whole, strict=True)]).double()
    population = torch.tensor(levels.whole)
    spread = (squares - means.square()) * torch.where(population, 1.0, counts / (counts - 1).clamp(min=1))
    noise = torch.where(population, 0.0, spread / counts)  # variance of the estimated means
    share = levels.share
    of_levels = (share * (means.square() - noise)).sum() - ((share * means).sum() ** 2 - (share**2 * noise).sum())
    square = levels.length**2
    return {"level": (square * of_levels).item(), "within": (square * (share * spread).sum()).item()}


def bernoulli_variance(levels: Levels, sums: list[torch.Tensor], epsilon: float = EPSILON) -> float:
    """Of one Bernoulli draw with t in (epsilon, 1)."""
    means, squares = level_means(levels, sums)
    weights = hats(levels.length, levels.levels)
    first, second = (weights @ bernoulli_moments(levels.length, power, epsilon) for power in (1, 2))
    return ((second * squares).sum() - (first * means).sum() ** 2).item()


def token_variance(levels: Levels, terms: list[torch.Tensor]) -> float:
    """The part `tokens` of the analysis of variance, from f_i(m) of each level's masks, `(M_j, L)`."""
    length, shares, within = levels.length, [], []
    for level, masks, whole, f in zip(levels.levels, levels.masks, levels.whole, terms, strict=True):
        z, f = f.double().sum(1) / level, f.double()
        within.append(z.var(correction=0 if whole else 1) if len(z) > 1 else z.new_zeros(()))
        if level == 1 or level == length or length == 1:
            shares.append(1.0)
        elif whole:
            shares.append(_linear(level, length, (f.sum(0) / masks.sum(0)).square().sum(), z.mean() ** 2) / within[-1])
        elif level < length / 8:
            shares.append(None)
        else:
            pairs = len(f) * (len(f) - 1)
            squares = (f.sum(0).square() - f.square().sum(0)).sum() / pairs * (length / level) ** 2
            mean = (z.sum() ** 2 - z.square().sum()) / pairs
            shares.append(_linear(level, length, squares, mean) / within[-1].clamp(min=1e-30))
    shares = _fill(levels.levels, [None if s is None else float(s) for s in shares])
    return (length**2 * (levels.share * torch.tensor(shares).double() * torch.stack(within)).sum()).item()


def _linear(level, length, sum_of_squares, squared_mean):
    """Variance of the mean over m of the mu_i in m, m one of the subsets of `level` tokens."""
    return (length - level) / (level * length * (length - 1)) * (sum_of_squares - length * squared_mean)


def _fill(levels: list[int], shares: list[float | None]) -> list[float]:
    """Unknown shares between the 1 of level 1 and the first known one, linearly in the level."""
    known = next(j for j, share in enumerate(shares) if j and share is not None)
    slope = (shares[known] - 1) / (levels[known] - 1)
    return [1 + slope * (level - 1) if s is None else s for level, s in zip(levels, shares, strict=True)]
